"""The benchmark of token reduction: every model at both rates, what is counted, and a gate that can fail."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("timm")
from benchmarks import bench_reduction
from benchmarks.bench_reduction import BY_OPERATIONS, FULL, MODELS, OURS, QUICK, TIMM
from benchmarks.harness import DisagreementError
from ffvt.model.config import make_config


def config(**changes):
    return make_config("vit_b16", num_select=3, keep_rate=0.7, **{**QUICK, **changes})


@pytest.mark.slow
def test_it_writes_every_model_at_both_rates(tmp_path, capsys):
    out, threads = tmp_path / "reduction.jsonl", str(torch.get_num_threads())
    options = ["--rounds", "2", "--batch_size", "1", "--threads", threads, "--dtypes", "fp32", "--num_select", "3"]
    bench_reduction.main(["--quick", *options, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["case"] for record in records] == [case for name in MODELS for case in (name, f"{name}, keep 0.7")]
    assert "speed-up over every token, by operations (forward)" in capsys.readouterr().out
    for full, reduced in zip(records[::2], records[1::2]):
        assert full["speedup"] == {FULL: {"medians": 1.0, "paired": 1.0}, BY_OPERATIONS: {"medians": 1.0}}
        expected = full["flops_per_image"] / reduced["flops_per_image"]
        assert reduced["speedup"][BY_OPERATIONS]["medians"] == pytest.approx(expected, abs=1e-4)
        assert expected > 1.1


def test_the_plain_model_costs_what_its_tokens_cost():
    """36 patches, then 26 and one, then 19 and one: products of weights, and of attention, block by block."""
    found = bench_reduction.Inference(bench_reduction.PLAIN, config(prune_dead_rows=False), 1, "fp32", "cpu").flops()
    dim, hidden = 64, 128
    blocks = sum(2 * n * dim * (4 * dim + 2 * hidden) + 4 * n * n * dim for n in (37, 28, 21, 21))
    sums = 2 * dim * (37 + 28)
    assert found == blocks + sums + 2 * 36 * 3 * 16 * 16 * dim + 2 * dim * 200


def test_the_gate_passes():
    bench_reduction.check_agreement(config(), "cpu")


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (TIMM, dict(keep_rate=0.9), "logits of fused timm ViT and FFVT"),
        (OURS, dict(first_candidate=1), "of fused timm ViT and FFVT"),
    ],
)
def test_models_that_disagree_are_not_timed(monkeypatch, name, broken, message):
    build = bench_reduction.build

    def build_broken(asked, given):
        return build(asked, dataclasses.replace(given, **broken) if (asked, given.keep_rate) == (name, 0.7) else given)

    monkeypatch.setattr(bench_reduction, "build", build_broken)
    with pytest.raises(DisagreementError, match=message):
        bench_reduction.check_agreement(config(), "cpu")


def test_a_rate_of_one_is_refused():
    with pytest.raises(SystemExit):
        bench_reduction.parse(["--keep_rate", "1"])
