"""The summary of a GPU report: markdown from its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.attention_rivals import OURS, RIVALS
from benchmarks.tables import table

Record = Mapping[str, Any]


def summary(records: Sequence[Record], failures: Sequence[str], left_out: Sequence[str]) -> str:
    """Markdown: what a reader needs first, the goals, then tables."""
    missing = sorted({f"{record['case']}: {record['missing']}" for record in records if "missing" in record})
    parts = [
        [f"# GPU report: {records[0]['environment']['device_name'] if records else 'nothing measured'}", ""],
        [f"- FAILED: {failure}" for failure in failures] or ["- no failure"],
        [f"- {record['summary']}" for record in of(records, "tests")],
        [f"- {record['what']}: {record['rate']:.2f} {record['unit']}" for record in of(records, "ceilings")],
        ["", "How many times faster ours is, statistics and selection included; below 1 it is slower.", ""],
        [attention_table(timed(records, "attention")), ""],
        [selection_table([*timed(records, "selection"), *timed(records, "statistics")]), ""],
        [variants_table(timed(records, "variants")), ""],
        [model_table(of(records, "model")), ""],
        ["Not measured:", *(f"- {line}" for line in missing), *(f"- no time for {what}" for what in left_out)],
    ]
    return "\n".join(line for lines in parts for line in lines)


def of(records: Iterable[Record], section: str) -> list[Record]:
    """The records of one section."""
    return [record for record in records if record["benchmark"] == f"gpu_{section}"]


def timed(records: Iterable[Record], section: str) -> list[Record]:
    """Those of them that have a time."""
    return [record for record in of(records, section) if "time_ms" in record]


def attention_table(records: Iterable[Record]) -> str:
    """A row per shape, mode and launch: our TFLOP/s, and how many times faster than each rival we are."""
    rivals = [name for name in RIVALS["cuda"] if name != OURS]
    rows = []
    for record in records:
        if record["case"] == OURS:
            faster = (record["speedup"].get(name) for name in rivals)
            rows.append(
                [
                    ", ".join(map(str, record["parameters"]["shape"])),
                    *(record["dtype"], record["mode"], f"{record['launch']}, {record['l2']}"),
                    f"{record['gflops'] / 1e3:.0f}",
                    *(f"{ratio['medians']:.2f}" if ratio else "-" for ratio in faster),
                ]
            )
    header = ["B, N, H, D", "dtype", "mode", "launch, L2", "ours, TFLOP/s", *rivals]
    return table(header, "llll" + "r" * (1 + len(rivals)), rows)


def selection_table(records: Iterable[Record]) -> str:
    """A row per size, dtype, operator, launch and rival: microseconds."""
    rows = [
        [
            f"{record['parameters']['batch_size']}, {record['parameters']['tokens']}",
            *(record["dtype"], record["mode"], record["launch"], record["case"]),
            f"{record['time_ms']['median'] * 1e3:.1f}",
        ]
        for record in records
    ]
    return table(["B, N", "dtype", "what", "launch", "case", "us"], "lllllr", rows)


def variants_table(records: Iterable[Record]) -> str:
    """A row per shape, kernel and row of the tuning table, the fastest first."""
    ranked = sorted(records, key=lambda r: (r["parameters"]["shape"], r["kernel"], -r["gflops"]))
    rows = [
        [", ".join(map(str, r["parameters"]["shape"])), r["kernel"], r["case"], f"{r['gflops'] / 1e3:.0f}"]
        for r in ranked
    ]
    return table(["B, N, H, D", "kernel", "row", "TFLOP/s"], "lllr", rows)


def model_table(records: Iterable[Record]) -> str:
    """A row per batch, mode and model: images per second, or why there are none."""
    rows = [
        [
            *(str(record["parameters"]["batch"]), record["mode"], record["case"]),
            f"{record['images_per_second']:.0f}" if "time_ms" in record else record["missing"],
        ]
        for record in records
    ]
    return table(["batch", "mode", "model", "images/s"], "rllr", rows)
