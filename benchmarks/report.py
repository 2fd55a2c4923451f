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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

Record = Mapping[str, Any]
MIB = 1024**2
EAGER, COMPILED, COMPOSITION, OURS = "authors' eager", "authors' eager, compiled", "composition", "ours"


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
    by_benchmark: dict[str, list[Record]] = {}
    for record in records:
        by_benchmark.setdefault(record["benchmark"], []).append(record)
    for name, found in by_benchmark.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        tables = _renderer(found[0])(found)
        body = f"{begin}\n{tables}\n{end}"
        text, count = section.subn(lambda _match, body=body: body, text)
        if count != 1:
            raise ReportError(f"report: README must hold {begin} and {end} once, in this order; found {count} pairs")
    return text


def _renderer(record: Record) -> Callable[[Sequence[Record]], str]:
    """What makes the tables of records of this kind."""
    if "ratios" in record:
        return render_error_ratios
    if "tried" in record:
        return render_counts
    if "gflops" in record:
        return render_attention
    return render if "time_ms" in record else render_accuracies


def render(records: Iterable[Record]) -> str:
    """Markdown: a caption and a table for every device, dtype and set of parameters, in order of first appearance."""
    tables: dict[tuple, dict[tuple[str, str], Record]] = {}
    for record in records:
        tables.setdefault(_table_key(record), {})[record["mode"], record["case"]] = record
    return "\n\n".join(f"{_caption(latest.values())}\n\n{render_table(latest.values())}" for latest in tables.values())


def _table_key(record: Record) -> tuple:
    where = record["environment"]
    parameters = json.dumps(record["parameters"], sort_keys=True)
    return where["device"], where["device_name"], instruction_set(where), where["threads"], record["dtype"], parameters


def instruction_set(environment: Mapping[str, Any]) -> str:
    """The CPU features that matrix products depend on, in words: "AVX512, AMX (bf16, int8)" or "AVX512, no AMX"."""
    units = [flag.removeprefix("amx_") for flag in environment["cpu_flags"] if flag.startswith("amx_")]
    amx = f"AMX ({', '.join(unit for unit in units if unit != 'tile')})" if units else "no AMX"
    return f"{environment['cpu_capability']}, {amx}"


def _caption(records: Iterable[Record]) -> str:
    records = list(records)
    newest = max(records, key=lambda record: record["date"])
    where = newest["environment"]
    if where["device"] == "cuda":
        device = f"{where['device_name']}, driver {where['driver']}, CUDA {where['cuda']}"
    else:
        device = f"{where['device_name']} ({instruction_set(where)}), {where['threads']} threads"
    commits = ", ".join(dict.fromkeys(str(record["environment"]["commit"]) for record in records))
    parameters = ", ".join(f"{name} {value}" for name, value in newest["parameters"].items())
    served = f"Ours on the {newest['served_by']} backend. " if newest.get("served_by") else ""
    return (
        f"**{device}; {newest['dtype']}; {parameters}.** "
        f"torch {where['torch']}, timm {where['timm']}, commit {commits}, {newest['date'][:10]}. {served}"
        f"Median [p20-p80] of {newest['time_ms']['n']} interleaved rounds; speed-up is the baseline's median over this "
        "one, below 1 is slower; memory is the peak over weights, optimiser state and inputs."
    )


def render_table(records: Iterable[Record]) -> str:
    """Markdown table of one run: a row per case; the modes' times, their speed-ups and peak memory."""
    records = list(records)
    modes = list(dict.fromkeys(record["mode"] for record in records))
    baselines = list(dict.fromkeys(name for record in records for name in record["speedup"]))
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(record["case"], {})[record["mode"]] = record
    joined = " / ".join(modes)
    header = [
        "rival",
        *(f"{mode}, ms" for mode in modes),
        *(f"speed-up over {baseline} ({joined})" for baseline in baselines),
        f"peak memory, MiB ({joined})",
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for case, by_mode in rows.items():
        found = [by_mode.get(mode) for mode in modes]
        times = [_time(record) for record in found]
        ratios = [" / ".join(_speedup(record, baseline) for record in found) for baseline in baselines]
        lines.append([case, *times, *ratios, " / ".join(_memory(record) for record in found)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render_attention(records: Iterable[Record]) -> str:
    """Markdown: a caption per device and thread count, a row per dtype and shape; the latest of each wins.

    A row has what ours takes, its rate and share of the matmul peak, and how many times faster it is than each rival.
    """
    tables: dict[tuple, dict[tuple, dict[str, Record]]] = {}
    for record in records:
        if record["case"] == OURS:
            where = record["environment"]
            table = tables.setdefault((where["device_name"], instruction_set(where), where["threads"]), {})
            table.setdefault((record["dtype"], *record["parameters"]["shape"]), {})[record["mode"]] = record
    return "\n\n".join(_attention_table(table) for table in tables.values())


def _attention_table(rows: Mapping[tuple, Mapping[str, Record]]) -> str:
    modes = ("forward", "backward", "both")
    newest = max((record for by_mode in rows.values() for record in by_mode.values()), key=lambda r: r["date"])
    where, parameters = newest["environment"], newest["parameters"]
    rivals = list(dict.fromkeys(name for by_mode in rows.values() for name in by_mode["forward"]["speedup"]))
    joined = " / ".join(modes)
    lines = [
        f"**{where['device_name']} ({instruction_set(where)}), {where['threads']} threads; H = "
        f"{parameters['shape'][2]}, K = {parameters['num_select']}.** torch {where['torch']}, commit {where['commit']}"
        f", {newest['date'][:10]}. Ours on the {newest['served_by']} backend. Medians of {newest['time_ms']['n']} "
        f"interleaved rounds; {joined}; times faster than each rival.",
        "",
        f"| dtype | B, N, D | ours, ms | GFLOP/s | share of matmul peak | {' | '.join(rivals)} |",
        f"| --- | --- {'| ---: ' * (3 + len(rivals))}|",
    ]
    for (dtype, batch, tokens, _, head_dim), by_mode in rows.items():
        found = [by_mode[mode] for mode in modes]
        cells = [
            dtype,
            f"{batch}, {tokens}, {head_dim}",
            " / ".join(_digits(record["time_ms"]["median"]) for record in found),
            " / ".join(f"{record['gflops']:.0f}" for record in found),
            " / ".join(f"{record['gflops'] / record['matmul_gflops']:.2f}" for record in found),
            *(" / ".join(_speedup(record, rival) for record in found) for rival in rivals),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_accuracies(records: Iterable[Record]) -> str:
    """Markdown: a caption and a row per variant with the top-1 accuracy of every seed; the latest run of each wins."""
    latest = {(record["variant"], record["seed"]): record for record in records}
    variants, seeds = (list(dict.fromkeys(key[part] for key in latest)) for part in (0, 1))
    newest = list(latest.values())[-1]
    where = newest["environment"]
    caption = (
        f"**{newest['parameters']}.** {where['device_name']}, torch {where['torch']}, commit {where['commit']}. "
        f"Top-1 on {newest['images']} test images; training at {newest['train_images_per_second']:.0f} images/s."
    )
    lines = [["variant", *(f"seed {seed}" for seed in seeds), "mean"], ["---", *["---:"] * (len(seeds) + 1)]]
    for variant in variants:
        found = [latest[variant, seed]["top1"] for seed in seeds if (variant, seed) in latest]
        cells = [f"{latest[variant, seed]['top1']:.3f}" if (variant, seed) in latest else "not run" for seed in seeds]
        lines.append([variant, *cells, f"{sum(found) / len(found):.3f}"])
    return caption + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render_error_ratios(records: Iterable[Record]) -> str:
    """Markdown: per backend and device a caption and a row per shape and dtype; the latest of each wins."""
    tables: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        tables.setdefault((record["backend"], record["environment"]["device"]), []).append(record)
    return "\n\n".join(_error_table(table, *key) for key, table in tables.items())


def render_counts(records: Iterable[Record]) -> str:
    """Markdown: what was done, and how often it came out well, of how many times; the latest of each wins."""
    latest = {record["fault"]: record for record in records}
    where = list(latest.values())[-1]["environment"]
    lines = [f"**{where['device_name']}, torch {where['torch']}, commit {where['commit']}.**", ""]
    lines += ["| what was done, and what must come of it | came out so |", "| --- | ---: |"]
    lines += [f"| {fault} | {record['passed']}/{record['tried']} |" for fault, record in latest.items()]
    return "\n".join(lines)


def _error_table(records: Iterable[Record], backend: str, device: str) -> str:
    latest = {(tuple(record["shape"]), record["dtype"]): record for record in records}
    where = list(latest.values())[-1]["environment"]
    interpreted = backend == "triton" and device == "cpu"
    on = "Triton's interpreter" if interpreted else f"The {backend} backend on {where['device_name']}"
    lines = [
        f"**{on}, torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}.** Picks: equal to the "
        "truth's wherever the scores are further apart than rounding.",
        "",
        "| B, N, H, D | dtype | out | dq | dk | dv | picks |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for (shape, dtype), record in latest.items():
        ratios = " | ".join(f"{ratio:.2f}" for ratio in record["ratios"].values())
        picks = "equal" if record["picks_equal"] else "DIFFER"
        unclear = f", {record['ambiguous_images']} ambiguous" if record["ambiguous_images"] else ""
        lines.append(f"| {', '.join(map(str, shape))} | {dtype} | {ratios} | {picks}{unclear} |")
    return "\n".join(lines)


def _time(record: Record | None) -> str:
    if record is None:
        return "-"
    low, middle, high = (_digits(record["time_ms"][name]) for name in ("p20", "median", "p80"))
    return f"{middle} [{low}-{high}]"


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _speedup(record: Record | None, baseline: str) -> str:
    if record is None or baseline not in record["speedup"]:
        return "-"
    return f"{record['speedup'][baseline]['medians']:.2f}"


def _memory(record: Record | None) -> str:
    if record is None or record["peak_memory_bytes"] is None:
        return "-"
    return f"{record['peak_memory_bytes'] / MIB:.0f}"


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
