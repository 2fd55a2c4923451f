"""All CPUs at a glance: a column for each, and a benchmark that names what it compares."""

from __future__ import annotations

from benchmarks.attention_rivals import COMPOSITION, OURS
from benchmarks.cpu_columns import COMPARED, render_cpu_columns
from benchmarks.harness import RESULTS
from benchmarks.report import read_results
from benchmarks.tables import grouped


def record(cpu, speedup, mode="forward", threads=2, tokens=197, dtype="fp32", case=OURS, device="cpu"):
    where = {"device": device, "cpu_name": cpu, "cpu_flags": [], "cpu_capability": "AVX2", "threads": threads}
    return {
        "benchmark": "maws_attention",
        "environment": where,
        "dtype": dtype,
        "parameters": {"tokens": tokens, "num_select": 12},
        "mode": mode,
        "case": case,
        "speedup": {COMPOSITION: {"medians": speedup}, "SDPA alone": {"medians": 9.0}},
    }


def test_a_single_cpu_has_no_such_table():
    assert render_cpu_columns([record("A", 1.5), record("A", 2.5, threads=1)]) == ""
    assert render_cpu_columns([record("A", 1.5), record("B", 2.5, device="cuda")]) == ""
    assert render_cpu_columns([record("A", 1.5), record("B", 2.5, case=COMPOSITION)]) == ""


def test_every_cpu_and_number_of_threads_has_a_column_and_every_shape_a_row():
    records = [record("A", 1.5), record("A", 1.75, "both"), record("A", 3, tokens=785), record("B", 4, threads=1)]
    caption, _, *lines = render_cpu_columns(records).splitlines()
    assert caption.startswith("**Speed-up on every CPU, ours over composition (forward / both); num_select 12.**")
    assert lines == [
        "| dtype | parameters | A (AVX2, no AMX), 2 threads | B (AVX2, no AMX), 1 thread |",
        "| --- | --- | ---: | ---: |",
        "| fp32 | tokens 197 | 1.50 / 1.75 | 4.00 / - |",
        "| fp32 | tokens 785 | 3.00 / - | - |",
    ]


def test_the_latest_line_wins_over_those_of_its_own_cpu_alone():
    text = render_cpu_columns([record("A", 1.5), record("B", 2.5), record("B", 2.75)])
    assert text.splitlines()[-1] == "| fp32 | 1.50 | 2.75 |"


def test_rows_say_what_they_compare_where_that_differs():
    rivals = {rival: {"medians": 2.0} for rival in ("timm plain ViT", "authors' eager")}
    records = [{**record(cpu, 2), "benchmark": "model", "speedup": rivals} for cpu in "AB"]
    assert render_cpu_columns(records).splitlines()[-2:] == [
        "| fp32 | ours over timm plain ViT | 2.00 | 2.00 |",
        "| fp32 | ours over authors' eager | 2.00 | 2.00 |",
    ]


def test_every_benchmark_of_speed_names_what_it_compares_and_its_results_have_it():
    timed = grouped((r for r in read_results(RESULTS) if "speedup" in r), lambda record: record["benchmark"])
    assert timed.keys() == COMPARED.keys()
    for name, found in timed.items():
        assert set(COMPARED[name]) <= {(record["case"], rival) for record in found for rival in record["speedup"]}
