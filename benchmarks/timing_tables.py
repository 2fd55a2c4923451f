"""Markdown tables of times: a group of tables per device; in each the latest line of each mode and rival wins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.attention_rivals import OURS
from benchmarks.devices import cpu_and_threads, cpu_label, device_label
from benchmarks.tables import Record, grouped, table

MIB = 1024**2


def render(records: Iterable[Record]) -> str:
    """Markdown, device by device: a caption and a table for every dtype and set of parameters; the latest wins."""

    def of_table(record: Record) -> tuple[str, str]:
        return record["dtype"], json.dumps(record["parameters"], sort_keys=True)

    tables = []
    for of_device in grouped(records, _device).values():
        for found in grouped(of_device, of_table).values():
            latest = {(mode_of(record), record["case"]): record for record in found}.values()
            tables.append(f"{_caption(latest)}\n\n{render_table(latest)}")
    return "\n\n".join(tables)


def _device(record: Record) -> tuple[str, str, str, int]:
    """What a group of tables is of; on a GPU its host, which launches the work, tells two apart as well."""
    where = record["environment"]
    return where["device"], device_label(where), cpu_label(where), where["threads"]


def mode_of(record: Record) -> str:
    """The mode, and how a GPU was made to run it where that is not a plain call."""
    graph = record.get("launch", "eager") == "graph"
    return f"{record['mode']}, {record['l2']} graph" if graph else record["mode"]


def _caption(records: Iterable[Record]) -> str:
    records = list(records)
    newest = max(records, key=lambda record: record["date"])
    where = newest["environment"]
    parameters = ", ".join(f"{name} {value}" for name, value in newest["parameters"].items())
    served = f"Ours on the {newest['served_by']} backend. " if newest.get("served_by") else ""
    return (
        f"**{_device_and_setup(where)}; {newest['dtype']}; {parameters}.** "
        f"torch {where['torch']}, timm {where['timm']}, commit {_commits(records)}, {newest['date'][:10]}. {served}"
        f"Median [p20-p80] of {newest['time_ms']['n']} interleaved rounds; speed-up is the baseline's median over this "
        "one, below 1 is slower; memory is the peak over weights, optimiser state and inputs."
    )


def _device_and_setup(environment: Mapping[str, Any]) -> str:
    if environment["device"] == "cuda":
        return f"{device_label(environment)}, driver {environment['driver']}, CUDA {environment['cuda']}"
    return cpu_and_threads(environment)


def _commits(records: Iterable[Record]) -> str:
    return ", ".join(dict.fromkeys(str(record["environment"]["commit"]) for record in records))


def render_table(records: Iterable[Record]) -> str:
    """Markdown table of one run: a row per case; the modes' times, their speed-ups and peak memory."""
    records = list(records)
    modes = list(grouped(records, mode_of))
    baselines = list(dict.fromkeys(name for record in records for name in record["speedup"]))
    joined = " / ".join(modes)
    header = [
        "rival",
        *(f"{mode}, ms" for mode in modes),
        *(f"speed-up over {baseline} ({joined})" for baseline in baselines),
        f"peak memory, MiB ({joined})",
    ]
    rows = []
    for case, found in grouped(records, lambda record: record["case"]).items():
        by_mode = {mode_of(record): record for record in found}
        cells = [by_mode.get(mode) for mode in modes]
        ratios = [" / ".join(speedup_of(record, baseline) for record in cells) for baseline in baselines]
        rows.append([case, *map(_time, cells), *ratios, " / ".join(map(_memory, cells))])
    return table(header, "l" + "r" * (len(header) - 1), rows)


def render_attention(records: Iterable[Record]) -> str:
    """Markdown: a caption per device, H and K, a row per dtype and shape; the latest of each wins.

    A row has what ours takes, its rate and share of the matmul peak, and how many times faster it is than each rival.
    """

    def of_table(record: Record) -> tuple:
        return *_device(record), record["parameters"]["shape"][2], record["parameters"]["num_select"]

    ours = [record for record in records if record["case"] == OURS]
    return "\n\n".join(_attention_table(found) for found in grouped(ours, of_table).values())


def _attention_table(records: Iterable[Record]) -> str:
    modes = ("forward", "backward", "both")
    records = {(r["dtype"], *r["parameters"]["shape"], mode_of(r)): r for r in records}.values()
    newest = max(records, key=lambda record: record["date"])
    where, parameters = newest["environment"], newest["parameters"]
    rivals = list(dict.fromkeys(name for record in records for name in record["speedup"]))
    caption = (
        f"**{_device_and_setup(where)}; H = {parameters['shape'][2]}, K = {parameters['num_select']}.** "
        f"torch {where['torch']}, commit {_commits(records)}, {newest['date'][:10]}. Ours on the {newest['served_by']} "
        f"backend. Medians of {newest['time_ms']['n']} interleaved rounds; {' / '.join(modes)}; times faster than each "
        "rival."
    )
    rows = []
    shapes = grouped(records, lambda r: (r["dtype"], *r["parameters"]["shape"], mode_of({**r, "mode": ""})))
    for (dtype, batch, tokens, _, head_dim, form), found in shapes.items():
        by_mode = {record["mode"]: record for record in found}
        cells = [by_mode[mode] for mode in modes]
        rows.append(
            [
                dtype,
                f"{batch}, {tokens}, {head_dim}{form}",
                " / ".join(_digits(record["time_ms"]["median"]) for record in cells),
                " / ".join(f"{record['gflops']:.0f}" for record in cells),
                " / ".join(f"{record['gflops'] / record['matmul_gflops']:.2f}" for record in cells),
                *(" / ".join(speedup_of(record, rival) for record in cells) for rival in rivals),
            ]
        )
    header = ["dtype", "B, N, D", "ours, ms", "GFLOP/s", "share of matmul peak", *rivals]
    return f"{caption}\n\n{table(header, 'll' + 'r' * (3 + len(rivals)), rows)}"


def _time(record: Record | None) -> str:
    if record is None:
        return "-"
    low, middle, high = (_digits(record["time_ms"][name]) for name in ("p20", "median", "p80"))
    return f"{middle} [{low}-{high}]"


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def speedup_of(record: Record | None, baseline: str) -> str:
    """How many times faster than the baseline, "-" where that is not known."""
    if record is None or baseline not in record["speedup"]:
        return "-"
    return f"{record['speedup'][baseline]['medians']:.2f}"


def _memory(record: Record | None) -> str:
    if record is None or record["peak_memory_bytes"] is None:
        return "-"
    return f"{record['peak_memory_bytes'] / MIB:.0f}"
