"""Puts the tables of the measured results into README.md.

    python -m benchmarks.report            rewrite README.md
    python -m benchmarks.report --check    change nothing; exit 1 if README.md is out of date

Reads benchmarks/results/*.jsonl and fills the text between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` for every
benchmark NAME found. One table per device, dtype and set of parameters; in it the latest line of each mode and rival
wins. Lines with `top1` make a table of accuracies, a column per seed; lines with `ratios` one of error ratios; lines
with `tried` one of counts. Other lines are passed over.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.tables import Record, grouped, renderer


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
            if {"time_ms", "top1", "ratios", "tried"} & record.keys():
                records.append(record)
    if not records:
        raise ReportError(f"report: no results in {folder.name}/*.jsonl; run python -m benchmarks.bench_model first")
    return records


def update(text: str, records: Iterable[Record]) -> str:
    """README text with the section of every benchmark among the records replaced.

    Raises:
        ReportError: a benchmark's markers are missing.
    """
    for name, found in grouped(records, lambda record: record["benchmark"]).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        tables = renderer(found[0])(found)
        body = f"{begin}\n{tables}\n{end}"
        text, count = section.subn(lambda _match, body=body: body, text)
        if count != 1:
            raise ReportError(f"report: README must hold {begin} and {end} once, in this order; found {count} pairs")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites or checks the README; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON-lines files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.readme.exists():
            raise ReportError(f"report: there is no {arguments.readme.name}")
        before = arguments.readme.read_text()
        after = update(before, read_results(arguments.results))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.check and after != before:
        print(f"report: {arguments.readme.name} is out of date; run python -m benchmarks.report", file=sys.stderr)
        return 1
    if not arguments.check:
        arguments.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
