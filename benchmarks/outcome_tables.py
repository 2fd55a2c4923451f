"""Markdown tables of what came out: accuracies, counts, error ratios. The latest line of a CPU or GPU wins over its own
earlier ones alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.devices import cpu_and_threads, device_label
from benchmarks.tables import Record, grouped, table


def _device(record: Record) -> str:
    return device_label(record["environment"])


def render_accuracies(records: Iterable[Record]) -> str:
    """Markdown: a table for each device and setting; a row per variant with the top-1 accuracy of every seed."""
    tables = grouped(records, lambda record: (_device(record), record["parameters"]))
    return "\n\n".join(_accuracy_table(found) for found in tables.values())


def _accuracy_table(records: Iterable[Record]) -> str:
    latest = {(record["variant"], record["seed"]): record for record in records}
    variants, seeds = (list(dict.fromkeys(key[part] for key in latest)) for part in (0, 1))
    newest = list(latest.values())[-1]
    where = newest["environment"]
    caption = (
        f"**{newest['parameters']}.** {_device(newest)}, torch {where['torch']}, commit {where['commit']}. "
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
    """Markdown: a table for each setting; a row per criterion, best first: accuracy, spread of the runs, hit rate.

    The runs of all devices count: what is learned hardly depends on them.
    """
    tables = []
    for parameters, found in grouped(records, lambda record: record["parameters"]).items():
        where = found[-1]["environment"]
        devices = ", ".join(grouped(found, _device))
        caption = f"**{parameters}.** {devices}, torch {where['torch']}, commit {where['commit']}."
        rows = []
        for name, runs in grouped(found, lambda record: record["criterion"]).items():
            latest = {(_device(record), record["seed"]): record for record in runs}.values()
            accuracies = [record["accuracy"] for record in latest]
            hits = [record["hit_rate"] for record in latest if record["hit_rate"] is not None]
            mean = statistics.mean(accuracies)
            spread = f"{statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else "-"
            shown = f"{statistics.mean(hits):.3f}" if hits else "-"
            cells = [name, f"{mean:.3f}", spread, f"{min(accuracies):.3f} to {max(accuracies):.3f}", shown]
            rows.append((mean, [*cells, str(len(accuracies))]))
        rows = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
        header = ["criterion", "accuracy", "deviation of a run", "range", "hit rate", "runs"]
        tables.append(f"{caption}\n\n{table(header, 'lrrrrr', rows)}")
    return "\n\n".join(tables)


def render_profiles(records: Iterable[Record]) -> str:
    """Markdown: a table for each device and setting; a row per operator that takes a hundredth of a column's time."""

    def of_table(record: Record) -> tuple[str, str]:
        return cpu_and_threads(record["environment"]), record["parameters"]

    return "\n\n".join(_profile_table(*key, found) for key, found in grouped(records, of_table).items())


def _profile_table(device: str, parameters: str, records: Iterable[Record]) -> str:
    latest = {(record["dtype"], record["mode"]): record for record in records}
    where = list(latest.values())[-1]["environment"]
    caption = f"**{device}; {parameters}.** torch {where['torch']}, commit {where['commit']}."
    operators = dict.fromkeys(
        name for record in latest.values() for name, share in record["operators"].items() if share >= 0.01
    )
    columns = []
    for record in latest.values():
        shares = [record["operators"].get(name, 0) for name in operators]
        cells = [f"{record['milliseconds']['median']:,.0f}", f"{record['share_of_peak']:.2f}"]
        columns.append([*cells, *(f"{share:.1%}" if share else "-" for share in [*shares, 1 - sum(shares)])])
    names = ["time, ms", "share of the matmul peak", *(f"`{name}`" for name in operators), "all others"]
    header = ["", *(f"{dtype} {mode}" for dtype, mode in latest)]
    return f"{caption}\n\n{table(header, 'l' + 'r' * len(latest), list(zip(names, *columns)))}"


def render_counts(records: Iterable[Record]) -> str:
    """Markdown, device by device: what was done, and how often it came out well, of how many times."""
    return "\n\n".join(_count_table(found) for found in grouped(records, _device).values())


def _count_table(records: Iterable[Record]) -> str:
    latest = {record["fault"]: record for record in records}
    newest = list(latest.values())[-1]
    caption = f"**{_device(newest)}, torch {newest['environment']['torch']}.**"
    rows = [
        [fault, f"{record['passed']}/{record['tried']}", record["environment"]["commit"]]
        for fault, record in latest.items()
    ]
    return f"{caption}\n\n{table(['what was done, and what must come of it', 'came out so', 'commit'], 'lrl', rows)}"


def render_error_ratios(records: Iterable[Record]) -> str:
    """Markdown: per backend and device a caption and a row per shape and dtype."""
    tables = grouped(records, lambda record: (record["backend"], _device(record)))
    return "\n\n".join(_error_table(found) for found in tables.values())


def _error_table(records: Iterable[Record]) -> str:
    latest = {(tuple(record["shape"]), record["dtype"]): record for record in records}
    newest = list(latest.values())[-1]
    backend, where = newest["backend"], newest["environment"]
    interpreted = backend == "triton" and where["device"] == "cpu"
    how = "Triton's interpreter" if interpreted else f"The {backend} backend"
    caption = (
        f"**{how} on {_device(newest)}, torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}.** "
        "Picks: equal to the truth's wherever the scores are further apart than rounding."
    )
    rows = []
    for (shape, dtype), record in latest.items():
        picks = "equal" if record["picks_equal"] else "DIFFER"
        unclear = f", {record['ambiguous_images']} ambiguous" if record["ambiguous_images"] else ""
        ratios = (f"{ratio:.2f}" for ratio in record["ratios"].values())
        rows.append([", ".join(map(str, shape)), dtype, *ratios, picks + unclear])
    return f"{caption}\n\n{table(['B, N, H, D', 'dtype', 'out', 'dq', 'dk', 'dv', 'picks'], 'llrrrrl', rows)}"
