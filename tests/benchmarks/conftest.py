"""A tiny model, and the records of one quick run of the model benchmark, which the report's tests read too."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import ffvt
from benchmarks import bench_model
from benchmarks.harness import append_results

TINY = ffvt.FFVTConfig(
    image_size=64, num_classes=5, embed_dim=64, depth=4, num_heads=4, mlp_dim=128, num_select=3, dropout=0.0
)


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `bench_model --quick`, without the pass for memory, which costs a second process."""
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("results") / "model.jsonl"
    threads = str(torch.get_num_threads())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_model, "peak_memory", lambda cases, device: [len(pickle.dumps(case)) for case in cases])
        bench_model.main(["--quick", "--rounds", "2", "--batch_size", "2", "--threads", threads, "--out", str(out)])
    append_results(
        out.with_name("other.jsonl"), [{"benchmark": "other", "count": 5}]
    )  # no times, no accuracies: passed over
    return out
