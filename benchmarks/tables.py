"""Markdown tables of measured results; in each the latest line of each mode and rival wins."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.attention_rivals import OURS

Record = Mapping[str, Any]
MIB = 1024**2


def table(header: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown table; align has an "l" or an "r" for each column."""
    rule = [{"l": "---", "r": "---:"}[side] for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """The records by key, in order of first appearance."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def renderer(record: Record) -> Callable[[Sequence[Record]], str]:
    """What makes the tables of records of this kind."""
    if "ratios" in record:
        return render_error_ratios
    if "tried" in record:
        return render_counts
    if "criterion" in record:
        return render_criteria
    if "gflops" in record:
        return render_attention
    return render if "time_ms" in record else render_accuracies


def render(records: Iterable[Record]) -> str:
    """Markdown: a caption and a table for every device, dtype and set of parameters; the latest of each wins."""

    def of_table(record: Record) -> tuple:
        parameters = json.dumps(record["parameters"], sort_keys=True)
        return record["environment"]["device"], *_machine(record), record["dtype"], parameters

    tables = []
    for found in grouped(records, of_table).values():
        latest = {(_mode(record), record["case"]): record for record in found}.values()
        tables.append(f"{_caption(latest)}\n\n{render_table(latest)}")
    return "\n\n".join(tables)


def _machine(record: Record) -> tuple[str, str, int]:
    where = record["environment"]
    return where["device_name"], instruction_set(where), where["threads"]


def instruction_set(environment: Mapping[str, Any]) -> str:
    """The CPU features that matrix products depend on, in words: "AVX512, AMX (bf16, int8)" or "AVX512, no AMX"."""
    units = [flag.removeprefix("amx_") for flag in environment["cpu_flags"] if flag.startswith("amx_")]
    amx = f"AMX ({', '.join(unit for unit in units if unit != 'tile')})" if units else "no AMX"
    return f"{environment['cpu_capability']}, {amx}"


def _mode(record: Record) -> str:
    """The mode, and how a GPU was made to run it where that is not a plain call."""
    graph = record.get("launch", "eager") == "graph"
    return f"{record['mode']}, {record['l2']} graph" if graph else record["mode"]


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
    modes = list(grouped(records, _mode))
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
        by_mode = {_mode(record): record for record in found}
        cells = [by_mode.get(mode) for mode in modes]
        ratios = [" / ".join(_speedup(record, baseline) for record in cells) for baseline in baselines]
        rows.append([case, *map(_time, cells), *ratios, " / ".join(map(_memory, cells))])
    return table(header, "l" + "r" * (len(header) - 1), rows)


def render_attention(records: Iterable[Record]) -> str:
    """Markdown: a caption per device and thread count, a row per dtype and shape; the latest of each wins.

    A row has what ours takes, its rate and share of the matmul peak, and how many times faster it is than each rival.
    """
    ours = [record for record in records if record["case"] == OURS]
    return "\n\n".join(_attention_table(found) for found in grouped(ours, _machine).values())


def _attention_table(records: Sequence[Record]) -> str:
    modes = ("forward", "backward", "both")
    newest = max(records, key=lambda record: record["date"])
    where, parameters = newest["environment"], newest["parameters"]
    rivals = list(dict.fromkeys(name for record in records for name in record["speedup"]))
    joined = " / ".join(modes)
    caption = (
        f"**{where['device_name']} ({instruction_set(where)}), {where['threads']} threads; H = "
        f"{parameters['shape'][2]}, K = {parameters['num_select']}.** torch {where['torch']}, commit {where['commit']}"
        f", {newest['date'][:10]}. Ours on the {newest['served_by']} backend. Medians of {newest['time_ms']['n']} "
        f"interleaved rounds; {joined}; times faster than each rival."
    )
    rows = []
    shapes = grouped(records, lambda r: (r["dtype"], *r["parameters"]["shape"], _mode({**r, "mode": ""})))
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
                *(" / ".join(_speedup(record, rival) for record in cells) for rival in rivals),
            ]
        )
    header = ["dtype", "B, N, D", "ours, ms", "GFLOP/s", "share of matmul peak", *rivals]
    return f"{caption}\n\n{table(header, 'll' + 'r' * (3 + len(rivals)), rows)}"


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
    rows = []
    for variant in variants:
        found = [latest[variant, seed]["top1"] if (variant, seed) in latest else None for seed in seeds]
        top1 = [value for value in found if value is not None]
        cells = ["not run" if value is None else f"{value:.3f}" for value in found]
        rows.append([variant, *cells, f"{sum(top1) / len(top1):.3f}"])
    header = ["variant", *(f"seed {seed}" for seed in seeds), "mean"]
    return f"{caption}\n\n{table(header, 'l' + 'r' * (len(seeds) + 1), rows)}"


def render_criteria(records: Iterable[Record]) -> str:
    """Markdown: a table for each setting, best first; a row per criterion: accuracy, spread of the seeds, hit rate."""
    tables = []
    for parameters, found in grouped(records, lambda record: record["parameters"]).items():
        where = found[-1]["environment"]
        caption = f"**{parameters}.** {where['device_name']}, torch {where['torch']}, commit {where['commit']}."
        rows = []
        for name, runs in grouped(found, lambda record: record["criterion"]).items():
            latest = {record["seed"]: record for record in runs}.values()
            accuracies = [record["accuracy"] for record in latest]
            hits = [record["hit_rate"] for record in latest if record["hit_rate"] is not None]
            mean = statistics.mean(accuracies)
            spread = f"{statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else "-"
            shown = f"{statistics.mean(hits):.3f}" if hits else "-"
            cells = [name, f"{mean:.3f}", spread, f"{min(accuracies):.3f} to {max(accuracies):.3f}", shown]
            rows.append((mean, [*cells, str(len(accuracies))]))
        rows = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
        header = ["criterion", "accuracy", "deviation of a seed", "range", "hit rate", "seeds"]
        tables.append(f"{caption}\n\n{table(header, 'lrrrrr', rows)}")
    return "\n\n".join(tables)


def render_counts(records: Iterable[Record]) -> str:
    """Markdown: what was done, and how often it came out well, of how many times; the latest of each wins."""
    latest = {record["fault"]: record for record in records}
    where = list(latest.values())[-1]["environment"]
    caption = f"**{where['device_name']}, torch {where['torch']}.**"
    rows = [
        [fault, f"{record['passed']}/{record['tried']}", record["environment"]["commit"]]
        for fault, record in latest.items()
    ]
    return f"{caption}\n\n{table(['what was done, and what must come of it', 'came out so', 'commit'], 'lrl', rows)}"


def render_error_ratios(records: Iterable[Record]) -> str:
    """Markdown: per backend and device a caption and a row per shape and dtype; the latest of each wins."""
    tables = grouped(records, lambda record: (record["backend"], record["environment"]["device"]))
    return "\n\n".join(_error_table(found, *key) for key, found in tables.items())


def _error_table(records: Iterable[Record], backend: str, device: str) -> str:
    latest = {(tuple(record["shape"]), record["dtype"]): record for record in records}
    where = list(latest.values())[-1]["environment"]
    interpreted = backend == "triton" and device == "cpu"
    on = "Triton's interpreter" if interpreted else f"The {backend} backend on {where['device_name']}"
    caption = (
        f"**{on}, torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}.** Picks: equal to the "
        "truth's wherever the scores are further apart than rounding."
    )
    rows = []
    for (shape, dtype), record in latest.items():
        picks = "equal" if record["picks_equal"] else "DIFFER"
        unclear = f", {record['ambiguous_images']} ambiguous" if record["ambiguous_images"] else ""
        ratios = (f"{ratio:.2f}" for ratio in record["ratios"].values())
        rows.append([", ".join(map(str, shape)), dtype, *ratios, picks + unclear])
    return f"{caption}\n\n{table(['B, N, H, D', 'dtype', 'out', 'dq', 'dk', 'dv', 'picks'], 'llrrrrl', rows)}"


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
