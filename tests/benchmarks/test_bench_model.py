"""The model benchmark: its gate, its workloads, its records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import ffvt
from benchmarks import bench_model
from benchmarks.attention_rivals import EAGER, OURS
from benchmarks.harness import DisagreementError, require_close
from benchmarks.model_rivals import FUSION, OURS_PLAIN, PLAIN, TIMM, build_rival
from tests.benchmarks.conftest import TINY

RIVALS = (*FUSION, *PLAIN)


def test_the_model_benchmark_writes_a_line_per_rival_and_mode(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    expected = [(mode, name) for mode in ("forward", "step") for name in RIVALS]
    assert [(record["mode"], record["case"]) for record in records] == expected
    for record in records:
        assert record["time_ms"]["n"] == 2
        assert record["speedup"].keys() == {EAGER, TIMM}
        assert record["parameters"]["model_type"] == "tiny"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rival", RIVALS)
def test_a_training_step_changes_every_weight_that_learns_and_drops_the_gradients(rival: str, dtype: str) -> None:
    pytest.importorskip("timm")
    step = bench_model.Workload(rival, "step", TINY, 2, dtype, "cpu")()
    model = step.args[0]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) >= 0.9 * len(before)  # a key's bias has no gradient but rounding


def test_the_gate_holds_for_all_rivals_and_fails_for_a_rival_with_another_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    bench_model.check_agreement(TINY, "cpu")
    build = bench_model.build_rival

    def build_wrong(name: str, config: ffvt.FFVTConfig) -> torch.nn.Module:
        model = build(name, config)
        if name == OURS:
            model.blocks[0].attn.qkv.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(bench_model, "build_rival", build_wrong)
    with pytest.raises(DisagreementError, match="ours and authors' eager"):
        bench_model.check_agreement(TINY, "cpu")


def test_timm_drops_out_where_ours_does() -> None:
    """The same seed gives the same masks in the same order once ours computes every row of its last block."""
    pytest.importorskip("timm")
    config = dataclasses.replace(TINY, dropout=0.1, prune_dead_rows=False)
    timm_vit = build_rival(TIMM, config)
    ours = build_rival(OURS_PLAIN, config)
    images, _ = bench_model.random_batch(config, 2, "cpu")
    logits = []
    for model in (timm_vit, ours):
        torch.manual_seed(3)
        with ffvt.use_backend("torch"):  # for PyTorch's masks
            logits.append(model.train()(images))
    require_close("logits", logits[1], logits[0], 1e-5)
    with pytest.raises(DisagreementError):
        require_close("logits", timm_vit.eval()(images), logits[0], 1e-5)


def test_a_rival_measured_alone_has_its_rate_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = bench_model.Workload(OURS, "forward", TINY, 2, "fp32", "cpu")
    (record,) = bench_model.measure_alone(workload, rounds=1, warmup=0)
    assert record["images_per_second"] == pytest.approx(
        2e3 / record["time_ms"]["median"], rel=1e-2, abs=0.06
    )  # rounded

    def without_timm(name: str, config: ffvt.FFVTConfig) -> torch.nn.Module:
        raise ImportError("no timm")

    monkeypatch.setattr(bench_model, "build_rival", without_timm)
    (record,) = bench_model.measure_alone(workload, rounds=1, warmup=0)
    assert record["missing"] == "ImportError: no timm"
    assert "time_ms" not in record
