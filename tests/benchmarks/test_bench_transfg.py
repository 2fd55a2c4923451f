"""TransFG's benchmark: the authors' form against what their modules computed; the gate, the records."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ffvt
from benchmarks import bench_model, bench_transfg
from benchmarks.attention_rivals import OURS
from benchmarks.authors_transfg import AuthorsTransFG, product_of_maps
from benchmarks.bench_transfg import AUTHORS, BASELINES, RIVALS
from benchmarks.harness import DisagreementError
from benchmarks.model_rivals import OURS_PLAIN
from tests.benchmarks.conftest import TINY
from tests.helpers import golden, relative_error

TRANSFG = dataclasses.replace(TINY, head="transfg")


@pytest.fixture(params=[("transfg_tiny", None), ("transfg_tiny_overlap", 12)], ids=["whole", "overlap"])
def authors(request: pytest.FixtureRequest) -> tuple[AuthorsTransFG, dict[str, torch.Tensor]]:
    name, stride = request.param
    model = AuthorsTransFG(dataclasses.replace(TRANSFG, patch_stride=stride))
    model.load_state_dict({key: torch.from_numpy(value) for key, value in golden(name, "w/").items()}, strict=True)
    arrays = golden(name)
    found = {key: torch.from_numpy(arrays[key]) for key in ("x", "labels", "logits", "parts", "rollout")}
    return model, found


def test_authors_form_reproduces_the_authors_logits_parts_and_rollout(
    authors: tuple[AuthorsTransFG, dict[str, torch.Tensor]],
) -> None:
    model, expected = authors
    logits, features, parts, row = model.forward_with_parts(expected["x"])
    assert relative_error(logits, expected["logits"].numpy()) < 1e-5
    assert relative_error(row, expected["rollout"].numpy()) < 1e-5
    assert torch.equal(parts, expected["parts"])
    assert torch.equal(model.part_head(features), logits)


def test_the_maps_are_multiplied_from_the_first_layer_to_the_last() -> None:
    maps = [torch.randn(1, 2, 3, 3).softmax(-1) for _ in range(3)]
    torch.testing.assert_close(product_of_maps(maps), maps[2] @ maps[1] @ maps[0])


@pytest.mark.parametrize("change", [{"head": "ffvt"}, {"layer_scale": 1e-5}, {"qkv_bias": False}])
def test_authors_form_refuses_what_the_authors_model_lacks(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="authors' model"):
        AuthorsTransFG(dataclasses.replace(TRANSFG, **change))


@pytest.mark.slow
def test_the_benchmark_writes_a_line_per_stride_rival_and_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    # the pass for memory costs a second process; what it is given must travel to one
    monkeypatch.setattr(bench_model, "peak_memory", lambda cases, device: [len(pickle.dumps(c)) for c in cases])
    out, threads = tmp_path / "transfg.jsonl", str(torch.get_num_threads())
    rounds = ["--rounds", "2", "--warmup", "0", "--batch_size", "2", "--threads", threads]
    bench_transfg.main(["--quick", *rounds, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = [(record["parameters"]["patch_stride"], record["mode"], record["case"]) for record in records]
    assert found == [(stride, mode, name) for stride in (16, 12) for mode in ("forward", "step") for name in RIVALS]
    assert {record["parameters"]["tokens"] for record in records} == {17, 26}
    for record in records:
        assert record["time_ms"]["n"] == 2
        assert record["speedup"].keys() == set(BASELINES)
        assert record["peak_memory_bytes"] > 0
    tables = capsys.readouterr().out
    assert tables.count(f"| {OURS} |") == 2 == tables.count(f"| {AUTHORS} |")


@pytest.mark.parametrize("rival", RIVALS)
def test_a_step_trains_and_a_forward_does_not(rival: str) -> None:
    pytest.importorskip("timm")
    config = dataclasses.replace(TRANSFG, patch_stride=12)
    for mode in ("forward", "step"):
        call = bench_transfg.TransFGWorkload(rival, mode, config, 2, "fp32", "cpu")()
        model = call.args[0]
        before = [weight.detach().clone() for weight in model.parameters()]
        call()
        moved = [not torch.equal(weight, old) for weight, old in zip(model.parameters(), before)]
        assert model.training == (mode == "step")
        assert sum(moved) == 0 if mode == "forward" else sum(moved) >= 0.9 * len(moved)  # a key's bias stays


@pytest.mark.parametrize("stride", [None, 12])
@pytest.mark.parametrize("wrong", [OURS, OURS_PLAIN])
def test_the_gate_holds_and_fails_for_a_rival_with_another_scale(
    wrong: str, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    config = dataclasses.replace(TRANSFG, patch_stride=stride)
    bench_transfg.check_agreement(config, "cpu")
    build = bench_transfg.build_rival

    def build_wrong(name: str, config: ffvt.FFVTConfig) -> torch.nn.Module:
        model = build(name, config)
        if name == wrong:
            model.blocks[0].attn.qkv.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(bench_transfg, "build_rival", build_wrong)
    with pytest.raises(DisagreementError, match=f"of {wrong} and"):
        bench_transfg.check_agreement(config, "cpu")


def test_both_forms_have_one_loss_and_gradient() -> None:
    models = [bench_transfg.build_rival(name, TRANSFG) for name in (AUTHORS, OURS)]
    images = torch.randn(2, 3, 64, 64)
    for model in models:
        F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    authors, ours = models
    expected = {name: weight.grad for name, weight in authors.named_parameters()}
    gradients = ffvt.TransFG(TRANSFG)
    ffvt.load_weights(gradients, expected)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for (name, weight), gradient in zip(ours.named_parameters(), gradients.parameters()):
        torch.testing.assert_close(weight.grad, gradient.detach(), rtol=1e-4, atol=1e-6 * largest, msg=name)
