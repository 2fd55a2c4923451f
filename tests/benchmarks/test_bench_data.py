"""The input benchmark, end to end at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_input_benchmark_times_the_authors_chain_and_ours(tmp_path):
    """In a process of its own, as it binds itself to one core."""
    command = [sys.executable, "-m", "benchmarks.bench_data", "--quick", "--out", str(tmp_path / "data.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [record["case"] for record in records] == ["authors' chain", "ours, cached", "ours, decoding each time"]
    assert all(record["images_per_second"] > 0 for record in records)
