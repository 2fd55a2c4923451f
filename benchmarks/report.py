"""Puts the tables of the measured results into README.md and docs/*.md.

    python -m benchmarks.report            rewrite the pages
    python -m benchmarks.report --check    change nothing; exit 1 if a page is out of date

Reads benchmarks/results/*.jsonl and fills the text between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` for every
benchmark NAME found, on the one page that has it. One table per device, dtype and set of parameters; in it the latest
line of each mode and rival wins. Lines of another CPU add tables of their own, and from two CPUs on a table with a
column for each stands before them. Lines with `top1` make a table of accuracies, a column per seed; lines with `ratios`
one of error ratios; lines with `tried` one of counts; lines with `criterion` one of criteria; lines with `operators`
one of the operators' shares of time. Other lines are passed over.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.cpu_columns import render_cpu_columns
from benchmarks.harness import RESULTS, ROOT
from benchmarks.outcome_tables import (
    render_accuracies,
    render_counts,
    render_criteria,
    render_error_ratios,
    render_profiles,
)
from benchmarks.tables import Record, grouped
from benchmarks.timing_tables import render, render_attention


class ReportError(RuntimeError):
    """The report cannot be made; the message says what is missing."""


def read_results(folder: Path) -> list[Record]:
    """Every timing and accuracy of the folder's JSON-lines files, oldest first within a file.

    Raises:
        ReportError: there is none, or a line is not JSON.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ReportError(f"report: {path.name}:{number} is not JSON: {error}") from error
            if {"time_ms", "top1", "ratios", "tried", "criterion", "operators"} & record.keys():
                records.append(record)
    if not records:
        raise ReportError(f"report: no results in {folder.name}/*.jsonl; run python -m benchmarks.bench_model first")
    return records


def section(records: Sequence[Record]) -> str:
    """The tables of one benchmark: all CPUs at a glance, then each device's own."""
    return "\n\n".join(filter(None, (render_cpu_columns(records), renderer(records[0])(records))))


def renderer(record: Record) -> Callable[[Sequence[Record]], str]:
    """What makes the tables of records of this kind."""
    if "ratios" in record:
        return render_error_ratios
    if "tried" in record:
        return render_counts
    if "criterion" in record:
        return render_criteria
    if "operators" in record:
        return render_profiles
    if "gflops" in record:
        return render_attention
    return render if "time_ms" in record else render_accuracies


def update(pages: Mapping[Path, str], records: Iterable[Record]) -> dict[Path, str]:
    """The pages' texts with the section of every benchmark among the records replaced.

    Raises:
        ReportError: a benchmark's markers are missing.
    """
    pages = dict(pages)
    for name, found in grouped(records, lambda record: record["benchmark"]).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        body, pairs = f"{begin}\n{section(found)}\n{end}", 0
        for path, text in pages.items():
            pages[path], count = pattern.subn(lambda _match, body=body: body, text)
            pairs += count
        if pairs != 1:
            raise ReportError(f"report: one page must hold {begin} and {end} once, in this order; found {pairs} pairs")
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites or checks the pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON-lines files")
    parser.add_argument("--pages", type=Path, default=ROOT, help="folder that has README.md and docs/")
    arguments = parser.parse_args(argv)
    paths = [arguments.pages / "README.md", *sorted(arguments.pages.glob("docs/*.md"))]
    before = {path: path.read_text(encoding="utf-8") for path in paths if path.exists()}
    try:
        after = update(before, read_results(arguments.results))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    changed = [path for path in before if after[path] != before[path]]
    if arguments.check and changed:
        names = ", ".join(path.name for path in changed)
        print(f"report: {names} must be up to date; run python -m benchmarks.report", file=sys.stderr)
        return 1
    for path in () if arguments.check else changed:
        path.write_text(after[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
