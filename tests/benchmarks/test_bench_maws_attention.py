"""The attention benchmark: every mode and rival, and a gate that can fail."""

import json

import pytest
import torch

from benchmarks import bench_maws_attention, timing_tables
from benchmarks.attention_rivals import COMPILED, OURS, RIVALS, authors_eager
from benchmarks.bench_maws_attention import measure_problem
from benchmarks.harness import DisagreementError
from benchmarks.problem import Problem

PROBLEM = Problem(1, 37, 2, 16, "fp32", num_select=3)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.slow
def test_the_attention_benchmark_writes_every_mode_and_rival_and_its_gate_can_fail(tmp_path, monkeypatch):
    out = tmp_path / "maws_attention.jsonl"
    monkeypatch.setattr(bench_maws_attention, "matmul_peak", lambda dtype, device, sides: 80.0)
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--rounds", "2", "--threads", threads, "--out", str(out), "--dtypes", "fp32", "bf16"]
    bench_maws_attention.main(arguments)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    rivals = [name for name in RIVALS["cpu"] if name != COMPILED]
    modes = bench_maws_attention.MODES
    assert [(r["dtype"], r["mode"], r["case"]) for r in records] == [
        (dtype, mode, name) for dtype in ("fp32", "bf16") for mode in modes for name in rivals
    ]
    assert all(record["gflops"] > 0 and record["matmul_gflops"] == 80 for record in records)
    rows = timing_tables.render_attention(records).splitlines()[-2:]
    assert rows[0].startswith("| fp32 | 1, 37, 16 | ")
    assert rows[1].startswith("| bf16 | 1, 37, 16 | ")
    monkeypatch.setitem(RIVALS["cpu"], "SDPA alone", lambda qkv, k: (1.01 * qkv[:, :, 2], None))
    with pytest.raises(DisagreementError, match="out of SDPA alone"):
        bench_maws_attention.main(arguments)


def by_case(records):
    return {record["case"]: record for record in records}


def test_a_rival_that_cannot_serve_is_named_with_its_reason_and_the_others_are_timed():
    def missing(qkv, num_select):
        raise ImportError("no such package")

    rivals = {OURS: RIVALS["cpu"][OURS], "missing": missing, "SDPA": RIVALS["cpu"]["SDPA alone"]}
    refused, *timed = measure_problem(PROBLEM, rivals, 1, 0, sides=(16,))
    assert (refused["case"], refused["missing"]) == ("missing", "ImportError: no such package")
    assert [(record["mode"], record["case"]) for record in timed] == [
        (mode, case) for mode in ("forward", "backward", "both") for case in (OURS, "SDPA")
    ]
    assert {(record["launch"], record["l2"]) for record in timed} == {("eager", "hot")}


def test_a_rival_that_disagrees_is_not_timed():
    wrong = {"output": lambda qkv, k: (1.01 * qkv[:, :, 2], None)}
    wrong["picks"] = lambda qkv, k: (RIVALS["cpu"][OURS](qkv, k)[0], torch.zeros(1, k, dtype=torch.int64))
    found = by_case(measure_problem(PROBLEM, {OURS: RIVALS["cpu"][OURS], **wrong}, 1, 0, sides=(16,)))
    assert found["output"]["failed"].startswith("out of output: must agree")
    assert found["picks"]["failed"].startswith("picks of picks: must be equal")
    assert "time_ms" in found[OURS]


def test_ours_failing_while_it_is_set_up_is_a_failure_and_nothing_is_timed_beside_it(monkeypatch):
    rivals = {name: RIVALS["cpu"][name] for name in (OURS, "SDPA alone")}
    workload = bench_maws_attention.workload

    def broken(rival, mode, *inputs):
        if rival is rivals[OURS] and mode == "backward":
            raise RuntimeError("no graph")
        return workload(rival, mode, *inputs)

    monkeypatch.setattr(bench_maws_attention, "workload", broken)
    records = list(measure_problem(PROBLEM, rivals, 1, 0, sides=(16,)))
    assert [(r["mode"], r["case"], r["failed"]) for r in records if "failed" in r] == [
        ("backward", OURS, "RuntimeError: no graph")
    ]
    assert [r["mode"] for r in records if r["case"] == OURS] == ["forward", "backward", "both"]
    assert not [r for r in records if r["mode"] == "backward" and "time_ms" in r]


def test_the_authors_maps_have_a_limit():
    large = torch.empty(1, device="meta").expand(64, 8192, 3, 16, 64)
    with pytest.raises(RuntimeError, match="maps must take at most 24 GiB; got 1536 GiB"):
        authors_eager(large, 3)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_is_timed_from_python_and_from_graphs_with_a_hot_and_a_cold_cache():
    problem = Problem(1, 65, 2, 64, "fp16", "cuda")
    rivals = {name: RIVALS["cuda"][name] for name in (OURS, "authors' eager", "SDPA flash")}
    records = list(measure_problem(problem, rivals, 2, 1, sides=(64,)))
    forms = {("eager", "hot"), ("graph", "hot"), ("graph", "cold")}
    assert {(r["launch"], r["l2"]) for r in records if r["case"] == OURS} == forms
    assert not [record for record in records if "failed" in record]
