"""The GPU report's dry run: every section, on the CPU, in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is of machines without a GPU")
def test_the_gpu_report_runs_dry(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry_run", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    sections = {record["benchmark"].removeprefix("gpu_") for record in records}
    assert sections == {"tests", "accuracy", "ceilings", "attention", "selection", "variants", "model"}
    timed = [r for r in records if r["benchmark"] == "gpu_attention" and "time_ms" in r]
    assert {(r["case"], r["mode"]) for r in timed} >= {
        (case, mode) for case in ("ours", "authors' eager", "SDPA flash") for mode in ("forward", "backward", "step")
    }
    assert "| 1, 19, 2, 64 | fp16 | forward | eager, hot |" in (tmp_path / "summary.md").read_text()
