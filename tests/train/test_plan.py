"""Plans: the largest batch, the rate, the sizes they read, and the command line."""

import json

import pytest
import torch

from ffvt.cli import main
from ffvt.model.config import make_config
from ffvt.model.cost import flops_per_image
from ffvt.train import plan as plan_module
from ffvt.train.flags import parse_training_flags
from ffvt.train.memory import training_memory
from ffvt.train.plan import (
    EFFICIENCY,
    USABLE,
    free_memory,
    parse_bytes,
    plan,
)

CPU = torch.device("cpu")
GIB = 2**30
RATE = 1e12


@pytest.mark.parametrize("gib", [2, 8, 24])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fusion", [True, False])
def test_the_largest_batch_fits_and_one_more_does_not(gib, precision, fusion):
    config = make_config("ViT-B_16", feature_fusion=fusion)
    found = plan(config, gib * GIB, RATE, precision=precision)
    assert found.memory == training_memory(config, found.batch_size, precision=precision)
    assert found.memory.total <= USABLE * gib * GIB
    assert training_memory(config, found.batch_size + 1, precision=precision).total > USABLE * gib * GIB


def test_the_batch_is_larger_with_more_memory_and_with_what_saves_memory():
    config = make_config("ViT-B_16")
    batches = [plan(config, gib * GIB, RATE).batch_size for gib in (2, 4, 8, 16, 24, 80)]
    assert batches == sorted(set(batches))
    base = plan(config, 24 * GIB, RATE).batch_size
    assert plan(config, 24 * GIB, RATE, precision="bf16").batch_size > base
    saving = make_config("ViT-B_16", gradient_checkpointing=True)
    assert plan(saving, 24 * GIB, RATE).batch_size > 3 * base
    assert plan(config, 24 * GIB, RATE, optimizer="adamw", ema=True).batch_size < base


def test_images_per_second_are_the_share_of_the_matmul_rate():
    config = make_config("ViT-B_16")
    flops = flops_per_image(config, training=True, recomputation=True)
    assert plan(config, 24 * GIB, RATE, efficiency=0.5).images_per_second == pytest.approx(0.5 * RATE / flops)
    assert plan(config, 24 * GIB, RATE).efficiency == EFFICIENCY["ffvt"]
    saving = plan(make_config("ViT-B_16", gradient_checkpointing=True), 24 * GIB, RATE)
    slower = saving.images_per_second / plan(config, 24 * GIB, RATE).images_per_second
    assert 0.74 < slower < 0.77  # the forward is computed again


def test_the_default_share_gives_the_step_time_of_the_benchmark():
    """benchmarks/results/model.jsonl, bf16, batch 4, beside 419.5 GFLOP/s of matmul."""
    for fusion, seconds in ((True, 5.626), (False, 7.770)):
        found = plan(make_config("ViT-B_16", feature_fusion=fusion), 24 * GIB, 419.5e9)
        assert 4 / found.images_per_second == pytest.approx(seconds, rel=0.01)


def test_a_memory_that_holds_no_image_is_refused_with_what_helps():
    message = r"must hold one image, 1\.\d\d GiB; got 0\.45 GiB usable.*[Gg]radient checkpointing.*smaller.*fsdp"
    with pytest.raises(ValueError, match=message):
        plan(make_config("ViT-B_16"), GIB // 2, RATE)


@pytest.mark.parametrize(
    ("argument", "value"), [("memory_bytes", 0), ("matmul_flops", -1.0), ("efficiency", 0.0), ("efficiency", 1.5)]
)
def test_bad_arguments_are_named(argument, value):
    arguments = {"memory_bytes": 24 * GIB, "matmul_flops": RATE, argument: value}
    with pytest.raises(ValueError, match=f"^plan: {argument} must be .*; got {argument}={value}"):
        plan(make_config("ViT-B_16"), **arguments)


def test_sizes_are_read_as_written():
    sizes = {"24GiB": 24 * GIB, "24 GB": 24 * 10**9, "1.5mib": 3 * 2**19, "3MB": 3 * 10**6, "512B": 512}
    assert {text: parse_bytes(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "GiB", "24XB", "24", "-1GiB", "0GiB", "nan", "1e3"])
def test_other_sizes_are_refused_and_named(text):
    with pytest.raises(ValueError, match=f"memory must be a size .*; got memory='{text}'"):
        parse_bytes(text)


def test_free_memory_is_what_the_system_tells():
    assert 2**28 < free_memory(CPU) < 2**50


def planned(*flags):
    return main(["plan", "--model_type", "vit_s16", "--img_size", "224", "--tflops", "0.2", *flags])


def test_the_command_prints_the_plan_of_both_models(capsys):
    assert planned("--memory", "8GiB", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    config = make_config("vit_s16", image_size=224)
    batches = [
        plan(make_config("vit_s16", image_size=224, feature_fusion=fusion), 8 * GIB, RATE).batch_size
        for fusion in (True, False)
    ]
    assert f"largest batch{batches[0]:>35}{batches[1]:>12}" in shown
    assert "0.2 TFLOP/s of matmul (given)" in shown
    assert "not measured on a GPU yet" in shown
    assert f"{flops_per_image(config, training=True, recomputation=True) / 1e9:.0f}" in shown


def test_the_command_prints_json(capsys):
    assert planned("--memory", "8GiB", "--json", "--efficiency", "0.5", "--device", "cpu") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ffvt"]["batch_size"] > shown["plain_vit"]["batch_size"] > 1
    assert shown["ffvt"]["memory"]["activations"] > 2**30
    assert shown["plain_vit"]["efficiency"] == 0.5


def test_the_command_plans_transfg_beside_the_plain_model(capsys):
    flags = ["--head", "transfg", "--patch_stride", "12", "--memory", "8GiB", "--device", "cpu"]
    assert planned(*flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    config = make_config("vit_s16", image_size=224, head="transfg", patch_stride=12)
    expected = plan(config, 8 * GIB, RATE)
    assert found["transfg"]["batch_size"] == expected.batch_size
    assert found["transfg"]["efficiency"] == EFFICIENCY["transfg"]
    assert found["transfg"]["flops_per_image"] == expected.flops_per_image != found["plain_vit"]["flops_per_image"]
    assert planned(*flags) == 0
    assert f"{'':<38}{'TransFG':>10}{'plain ViT':>12}" in capsys.readouterr().out


def test_the_command_plans_ffvt_where_the_plain_model_does_not_fit(capsys):
    ffvt, plain = (training_memory(make_config("vit_s16", feature_fusion=fusion), 1).total for fusion in (True, False))
    assert ffvt < 0.99 * plain
    between = f"{int((ffvt + plain) / 2 / USABLE)}B"
    assert planned("--img_size", "448", "--memory", between, "--json", "--device", "cpu") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ffvt"]["batch_size"] == 1
    assert shown["plain_vit"] is None
    assert planned("--img_size", "448", "--memory", between, "--device", "cpu") == 0
    assert f"largest batch{'1':>35}{'-':>12}" in capsys.readouterr().out


def test_the_training_flags_work_as_pasted(capsys):
    pasted = ["--recipe", "partbirds", "--fp16", "--ema_decay", "0.9", "--device", "cpu"]
    assert main(["plan", *pasted, "--tflops", "0.2", "--memory", "1GiB", "--json", "--num_classes", "12"]) == 0
    found = json.loads(capsys.readouterr().out)["ffvt"]
    options = parse_training_flags(["--recipe", "partbirds"])
    config = make_config(options.model_type, **options.model_fields(12))
    assert (config.embed_dim, config.depth) == (96, 4)
    expected = plan(config, GIB, 0.2e12, "adamw", "fp16", ema=True)
    assert (found["batch_size"], found["parameters"]) == (expected.batch_size, expected.parameters)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(("flags", "named"), [([], "memory"), (["--memory", "24GiB", "--tflops", "nan"], "tflops")])
def test_a_gpu_that_is_not_here_must_be_described(flags, named, capsys):
    assert planned("--device", "cuda", *flags) == 1
    assert f"plan: {named} must be" in capsys.readouterr().err


def test_a_gpu_that_is_not_here_can_be_planned_for(capsys):
    assert planned("--device", "cuda", "--memory", "24GiB", "--json") == 0
    on_cuda = json.loads(capsys.readouterr().out)["ffvt"]["batch_size"]
    assert planned("--device", "cpu", "--memory", "24GiB", "--json") == 0
    on_cpu = json.loads(capsys.readouterr().out)["ffvt"]["batch_size"]
    assert on_cuda != on_cpu  # dropout keeps its masks there


def test_the_hybrid_is_refused_by_name(capsys):
    assert planned("--model_type", "r50_vit_b16", "--memory", "24GiB", "--device", "cpu") == 1
    assert "got model_type='r50_vit_b16'" in capsys.readouterr().err


def test_a_plain_model_that_is_no_ffvt_is_planned_alone(capsys):
    assert planned("--depth", "1", "--memory", "8GiB", "--device", "cpu", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ffvt"] is None
    assert shown["plain_vit"]["batch_size"] > 1


def test_a_whole_runs_time_is_told(capsys):
    assert planned("--memory", "8GiB", "--device", "cpu", "--num_steps", "7200", "--train_batch_size", "10") == 0
    rows = {line[:38].strip(): line[38:].split() for line in capsys.readouterr().out.splitlines()}
    rates = [float(rate) for rate in rows["images/s expected"]]
    assert [float(hours) for hours in rows["7200 steps of 10, hours"]] == pytest.approx(
        [20 / rate for rate in rates], rel=0.01
    )


HALF = {"fp32": 160e9, "bf16": 84e9, "fp16": 158e9}
TWICE = {"fp32": 100e9, "bf16": 200e9, "fp16": 2e9}


@pytest.mark.parametrize(("rates", "fastest"), [(HALF, "fp32"), (TWICE, "bf16")])
def test_auto_is_planned_at_the_measured_rate_of_the_fastest(rates, fastest, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "matmul_rates", lambda device: rates)
    flags = ["plan", "--model_type", "vit_s16", "--img_size", "224", "--memory", "8GiB", "--device", "cpu"]
    shown = []
    for precision in ("auto", fastest):
        assert main([*flags, "--precision", precision, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert (shown[0]["precision"], shown[0]["matmul_rates"]) == (fastest, rates)
    assert shown[0]["ffvt"]["matmul_flops"] == rates[fastest]
    assert main([*flags, "--precision", "auto"]) == 0
    told = capsys.readouterr().out
    assert f"{fastest} (auto), sgd" in told
    assert f"GFLOP/s; {fastest} trains fastest here\n" in told


def test_the_time_of_products_alone_is_their_operations_at_the_measured_rate(monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "matmul_rates", lambda device: HALF)
    flags = ["plan", "--model_type", "vit_s16", "--img_size", "224", "--memory", "8GiB", "--device", "cpu"]
    assert main([*flags, "--precision", "bf16", "--train_batch_size", "10", "--num_steps", "7200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    seconds, alone, hours, alone_hours = ([float(v) for v in line[38:].split()] for line in lines[13:17])
    assert lines[13].startswith("a step of 10, seconds")
    assert lines[14].startswith("  products alone, the rest on top")
    for fusion, step, products in zip((True, False), seconds, alone):
        config = make_config("vit_s16", image_size=224, feature_fusion=fusion)
        flops = flops_per_image(config, training=True, recomputation=True)
        assert products == pytest.approx(10 * flops / 84e9, rel=0.01)
        assert products / step == pytest.approx(EFFICIENCY[config.kind], rel=0.01)
    assert hours == pytest.approx([2 * s for s in seconds], rel=0.01)
    assert alone_hours == pytest.approx([2 * s for s in alone], rel=0.01)
    assert lines[-1] == "products alone: an estimate from below, at the whole rate of matrix products"


def test_auto_needs_the_rates_of_this_machine(monkeypatch, capsys):
    assert planned("--precision", "auto", "--memory", "8GiB", "--device", "cpu") == 1
    assert "plan: precision must be fp32, bf16 or fp16 with tflops" in capsys.readouterr().err
    monkeypatch.setattr(plan_module, "matmul_rates", lambda device: {"fp32": 1e12})
    flags = ["plan", "--model_type", "vit_s16", "--memory", "8GiB", "--device", "cpu"]
    assert main([*flags, "--precision", "bf16"]) == 1
    assert "must be one of fp32, in which this device multiplies; got precision='bf16'" in capsys.readouterr().err
