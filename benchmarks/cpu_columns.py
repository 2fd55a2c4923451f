"""All CPUs at a glance: a table with a column for each, of how many times faster ours is than its main rivals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.attention_rivals import COMPOSITION, EAGER, OURS
from benchmarks.devices import cpu_and_threads, cpu_label
from benchmarks.model_rivals import OURS_PLAIN, TIMM
from benchmarks.tables import Record, grouped, table
from benchmarks.timing_tables import speedup_of

COMPARED: dict[str, tuple[tuple[str, str], ...]] = {  # benchmark -> (case, the rival that it is compared with)
    "maws_attention": ((OURS, COMPOSITION),),
    "model": ((OURS, TIMM), (OURS, EAGER)),
    "transfg": ((OURS, OURS_PLAIN), (OURS, "authors' form")),
    "selection": ((OURS, "PyTorch operators"),),
    "attention_stats": ((OURS, "without statistics"), (OURS, "map in PyTorch")),
    "reduction": tuple((f"{name}, keep 0.7", "every token") for name in ("plain ViT", "FFVT", "fused timm ViT")),
    "cpu_kernels": (
        ("bf16, bf16 products, 2 threads", "fp32 with as many threads"),
        ("bf16, fp32 products, 2 threads", "fp32 with as many threads"),
        ("fp32, 2 threads", "itself with one thread"),
    ),
    "data": (("ours, cached", "authors' chain"), ("ours, decoding each time", "authors' chain")),
}


def render_cpu_columns(records: Iterable[Record]) -> str:
    """Markdown: a row per dtype, set of parameters and rival; a column per CPU and number of threads, modes in a cell.

    The records are of one benchmark; the latest of each row, mode and column wins. Empty for fewer than two CPUs, and
    for benchmarks that `COMPARED` does not have.
    """
    on_cpus = [record for record in records if record["environment"]["device"] == "cpu"]
    pairs = [
        (record, rival)
        for record in on_cpus
        for case, rival in COMPARED.get(record["benchmark"], ())
        if case == record["case"] and rival in record["speedup"]
    ]
    several = len({cpu_label(record["environment"]) for record, _ in pairs}) > 1
    return _side_by_side(pairs) if several else ""


def _side_by_side(pairs: Sequence[tuple[Record, str]]) -> str:
    cpus = list(dict.fromkeys(cpu_and_threads(record["environment"]) for record, _ in pairs))
    modes = list(dict.fromkeys(record["mode"] for record, _ in pairs))
    shared = _shared([record["parameters"] for record, _ in pairs])

    def labels_of(pair: tuple[Record, str]) -> tuple[str, str, str]:
        record, rival = pair
        own = {name: value for name, value in record["parameters"].items() if name not in shared}
        return record["dtype"], _words(own), f"{record['case']} over {rival}"

    rows = grouped(pairs, labels_of)
    columns = dict(zip(("dtype", "parameters", "what is compared"), zip(*rows)))
    told = {name: labels for name, labels in columns.items() if name == "dtype" or len(set(labels)) > 1}
    cells = [_cells(found, cpus, modes) for found in rows.values()]
    lines = [[*labels, *of_cpus] for labels, of_cpus in zip(zip(*told.values()), cells)]
    what = "" if "what is compared" in told else f", {columns['what is compared'][0]}"
    caption = "; ".join(filter(None, (f"Speed-up on every CPU{what} ({' / '.join(modes)})", _words(shared))))
    body = table([*told, *cpus], "l" * len(told) + "r" * len(cpus), lines)
    return f"**{caption}.** The tables of each CPU follow.\n\n{body}"


def _cells(pairs: Iterable[tuple[Record, str]], cpus: Sequence[str], modes: Sequence[str]) -> list[str]:
    """A row's cell for every CPU."""
    latest: dict[str, dict[str, str]] = {cpu: {} for cpu in cpus}
    for record, rival in pairs:
        latest[cpu_and_threads(record["environment"])][record["mode"]] = speedup_of(record, rival)
    return [" / ".join(found.get(mode, "-") for mode in modes) if found else "-" for found in latest.values()]


def _shared(parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all have in common."""
    first, *others = parameters
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
