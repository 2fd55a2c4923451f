"""The GPU report: its dry run in Triton's interpreter, and what it promises when something goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import SECTIONS, Report, goal_problems, measure_problems, other_problems
from benchmarks.gpu_summary import summary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(tmp_path):
    """A report of the dry run with a minute left."""
    return Report(tmp_path, "cpu", time.monotonic() + 60)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is of machines without a GPU")
def test_the_gpu_report_runs_dry(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry_run", "--out", str(tmp_path)]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    sections = {record["benchmark"].removeprefix("gpu_") for record in records}
    assert sections == set(SECTIONS) - {"shapes"}  # of which the dry run has none
    timed = [r for r in records if r["benchmark"] == "gpu_attention" and "time_ms" in r]
    assert {(r["case"], r["mode"]) for r in timed} >= {
        (case, mode) for case in ("ours", "authors' eager", "SDPA flash") for mode in ("forward", "backward", "both")
    }
    selected = {r["mode"] for r in records if r["benchmark"] == "gpu_selection"}
    assert selected == {"maws_select", "gather_tokens", "its gradient", "pick from row and column"}
    variants = [(r["kernel"], r["case"]) for r in records if r["benchmark"] == "gpu_variants" and "time_ms" in r]
    assert len(variants) == len(set(variants)) == 6  # the shipped row and one more of three kernels
    text = (tmp_path / "summary.md").read_text()
    assert "| 1, 19, 2, 64 | fp16 | forward | eager, hot |" in text
    assert "- no failure" in text


def test_a_record_is_in_the_file_as_soon_as_it_is_measured(report):
    def records():
        yield {"case": "a"}
        assert json.loads((report.out / "gpu.jsonl").read_text())["case"] == "a"
        yield {"case": "b"}

    report.collect("attention", "a shape", records())
    assert [record["case"] for record in report.records] == ["a", "b"]
    assert report.records[0]["benchmark"] == "gpu_attention"
    assert not report.failures


def test_past_the_deadline_nothing_is_begun_and_what_is_left_out_is_named(report):
    report.deadline = time.monotonic() - 1
    report.collect("selection", "B=8 N=577", iter([{"case": "a"}]))
    assert (report.records, report.left_out) == ([], ["selection B=8 N=577"])
    assert "- no time for selection B=8 N=577" in summary(report.records, report.failures, report.left_out)


def test_an_error_in_one_shape_is_a_failure_of_the_report_and_keeps_what_was_measured(report):
    def records():
        yield {"case": "a"}
        raise RuntimeError("illegal address\nand so on")

    report.collect("attention", "one shape", records())
    report.collect("attention", "the next", iter([{"case": "b"}]))
    assert [record["case"] for record in report.records] == ["a", "b"]
    assert report.failures == ["attention one shape: RuntimeError: illegal address"]


def test_a_record_that_failed_is_a_failure_of_the_report(report):
    report.add("attention", dtype="bf16", parameters={"shape": (1, 2, 3, 4)}, case="SDPA", failed="out of SDPA: apart")
    assert report.failures == ["attention, bf16, {'shape': (1, 2, 3, 4)}: out of SDPA: apart"]
    assert "- FAILED: attention, bf16" in summary(report.records, report.failures, [])


def test_every_shape_is_measured_once_and_the_goals_come_first():
    goals, others = goal_problems(), other_problems()
    assert len(set(goals)) == 12
    assert len({*goals, *others}) == len(goals) + len(others) == 60


@pytest.mark.slow
def test_the_compiled_rival_is_left_to_one_shape(report, monkeypatch):
    from benchmarks import bench_maws_attention, gpu_report

    asked = {}

    def record_rivals(problem, rivals, *_):
        asked[problem] = set(rivals)
        return iter(())

    monkeypatch.setattr(bench_maws_attention, "measure_problem", record_rivals)
    measure_problems(report, goal_problems())
    with_it = [problem for problem, rivals in asked.items() if "authors' eager, compiled" in rivals]
    assert with_it == [gpu_report.COMPILED_PROBLEM]
    assert all("authors' eager" in rivals for rivals in asked.values())
