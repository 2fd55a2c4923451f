"""The summary of a GPU report: markdown from its records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.attention_rivals import ATTENTION_ONLY, FUSED, OURS

Record = Mapping[str, Any]


def summary(records: Sequence[Record], failures: Sequence[str], left_out: Sequence[str]) -> str:
    """Markdown: what a reader needs first, the goals, then tables."""
    lines = [f"# GPU report: {records[0]['environment']['device_name'] if records else 'nothing measured'}", ""]
    lines += [f"- FAILED: {failure}" for failure in failures] or ["- no failure"]
    lines += [f"- {r['summary']}" for r in of(records, "tests")]
    for record in of(records, "ceilings"):
        speed = (
            f"{record['tflops']:.0f} TFLOP/s" if "tflops" in record else f"{record['terabytes_per_second']:.2f} TB/s"
        )
        lines.append(f"- {record['what']}: {speed}")
    lines += attention_table(records)
    lines += ["", "| B, N | what | launch | case | us |", "| --- | --- | --- | --- | ---: |"]
    for r in of(records, "selection"):
        size = f"{r['parameters']['batch']}, {r['parameters']['tokens']}"
        lines.append(f"| {size} | {r['mode']} | {r['launch']} | {r['case']} | {r['time_ms']['median'] * 1e3:.1f} |")
    lines += ["", "| shape | kernel | row | TFLOP/s |", "| --- | --- | --- | ---: |"]
    for r in sorted(
        (r for r in of(records, "variants") if "time_ms" in r),
        key=lambda r: (str(r["parameters"]), r["kernel"], -r["tflops"]),
    ):
        size = f"B={r['parameters']['batch']} N={r['parameters']['tokens']}"
        lines.append(f"| {size} | {r['kernel']} | {r['case']} | {r['tflops']:.0f} |")
    lines += ["", "| batch | mode | model | images/s |", "| ---: | --- | --- | ---: |"]
    for r in of(records, "model"):
        speed = f"{r['images_per_second']:.0f}" if "time_ms" in r else r["missing"]
        lines.append(f"| {r['parameters']['batch']} | {r['mode']} | {r['case']} | {speed} |")
    missing = sorted({f"{r['case']}: {r['missing']}" for r in records if "missing" in r})
    lines += ["", "Not measured:", *(f"- {line}" for line in missing), *(f"- no time for {x}" for x in left_out)]
    return "\n".join(lines)


def of(records: Sequence[Record], section: str) -> list[Record]:
    return [record for record in records if record["benchmark"] == f"gpu_{section}"]


def attention_table(records: Sequence[Record]) -> Iterator[str]:
    """A line per shape, mode and launch: our TFLOP/s, and how many times faster than each rival we are."""
    yield from ("", "How many times faster ours is, statistics and selection included; below 1 it is slower.", "")
    rivals = [name for name in (*FUSED, *ATTENTION_ONLY) if name != OURS]
    yield f"| B, N, H, D | dtype | mode | launch, L2 | ours, TFLOP/s | {' | '.join(rivals)} |"
    yield "| --- " * 4 + "| ---: " * (1 + len(rivals)) + "|"
    groups: dict[tuple, dict[str, dict]] = {}
    for r in of(records, "attention"):
        if "time_ms" in r:
            key = (*r["parameters"].values(), r["dtype"], r["mode"], f"{r['launch']}, {r['l2']}")
            groups.setdefault(key, {})[r["case"]] = r
    for (*size, dtype, mode, launch), cases in groups.items():
        ratios = [f"{1 / cases[name]['speed_over_ours']['medians']:.2f}" if name in cases else "-" for name in rivals]
        ours_tflops = f"{cases[OURS]['tflops']:.0f}"
        yield f"| {', '.join(map(str, size))} | {dtype} | {mode} | {launch} | {ours_tflops} | {' | '.join(ratios)} |"
