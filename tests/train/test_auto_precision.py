"""--precision auto: which precision a run holds, on every rank, and what of it is written and said."""

import json
import os

import pytest
import torch

from ffvt.train import engine
from ffvt.train.auto_precision import settle_precision
from ffvt.train.checkpoint import FACTS_FILE, load_checkpoint
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.flags import parse_training_flags
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log
from tests import faults
from tests.helpers import SMALL, flags
from tests.processes import ranks

HALF = {"fp32": 161e9, "bf16": 84e9, "fp16": 158e9}  # an Intel CPU whose virtual machine hides AMX
TWICE = {"fp32": 105e9, "bf16": 220e9, "fp16": 2e9}  # AMD Zen 4
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def trained(tmp_path, monkeypatch, caplog):
    """Trains a run of two steps, or more, on a machine of these rates, and returns its folder and what it said."""
    caplog.set_level("INFO", logger="ffvt")

    def run(name, rates, **changes):
        caplog.clear()
        monkeypatch.setattr(engine, "matmul_rates", lambda device: rates)
        given = {"dropout": 0.0, "ema_decay": 0.0, "num_steps": 2, "warmup_steps": 1, "resume": "", **changes}
        return train(faults.options(tmp_path, name, **given)).folder, caplog.text

    return run


def held(folder):
    """The precision that a run's config file, its log and its checkpoint say."""
    config = parse_training_flags(["--config", str(folder / "config.yaml")])
    log = [line for line in read_log(folder) if line["kind"] == "run"][-1]
    checkpoint = load_checkpoint(folder / "last").facts
    return {config.precision, *(found["options"]["precision"] for found in (log, checkpoint))}


@pytest.mark.parametrize(("rates", "chosen"), [(HALF, "fp32"), (TWICE, "bf16")])
def test_a_run_takes_the_fastest_and_holds_it_from_then_on(trained, rates, chosen):
    folder, said = trained("auto", rates, precision="auto")
    assert held(folder) == {chosen}
    assert f"precision: auto takes {chosen}" in said
    assert f"in {chosen} on the CPU" in said
    assert f"{chosen} trains fastest here" in said
    assert "matrix products run at" not in said
    explicit, _ = trained("explicit", rates, precision=chosen)
    assert faults.end_of(folder) == faults.end_of(explicit)
    (line,) = (line for line in read_log(folder) if line["kind"] == "run")
    assert (line["matmul_flops"], line["matmul_rates"]) == (rates[chosen], rates)


@pytest.mark.parametrize(
    ("first", "then", "own", "other"), [(TWICE, HALF, "bf16", "fp32"), (HALF, TWICE, "fp32", "bf16")]
)
def test_a_resumed_run_keeps_its_checkpoints_precision_and_says_where_another_is_faster(
    trained, first, then, own, other
):
    resumed = {"precision": "auto", "resume": "auto"}
    trained("run", first, precision="auto")
    trained("run", then, **resumed, strict=True)
    folder, said = trained("run", then, **resumed, num_steps=4)
    assert held(folder) == {own}
    assert f"precision: auto keeps the checkpoint's {own}, though {other} trains fastest here" in said
    assert "other options than the checkpoint's: num_steps: 2 -> 4\n" in said
    assert f"--precision {other} trains faster" in said  # and not auto, which would change nothing
    _, said = trained("run", first, **resumed, num_steps=6)
    assert f"precision: auto keeps the checkpoint's {own}\n" in said


def test_the_authors_flag_of_a_checkpoint_is_kept_too(trained):
    folder, said = trained("run", TWICE, fp16=True)
    assert "run at fp16 2, bf16 220 GFLOP/s here: --precision bf16 or auto without --fp16 trains faster" in said
    again, said = trained("run", TWICE, precision="auto", resume="auto", strict=True)
    assert "auto keeps the checkpoint's fp16, though bf16" in said
    options = load_checkpoint(again / "last").facts["options"]
    assert (options["fp16"], options["precision"]) == (True, "fp32")
    with pytest.raises(ValueError, match="precision must be bf16 or fp32 with fsdp=True"):
        settle_precision(TrainOptions(precision="auto", fsdp=True), folder / "last", TWICE, ALONE)


def test_a_checkpoint_without_a_precision_was_in_fp32_and_one_with_another_is_refused(tmp_path):
    facts = {"classes": ["a"], "resize_size": 8, "step": 1}
    options = {"dataset": "CUB", "data_root": "", "preset": "default", "seed": 1}
    for given, message in (({}, ""), ({"precision": "auto"}, "got precision='auto'"), ({"precision": "x"}, "='x'")):
        (tmp_path / FACTS_FILE).write_text(json.dumps({**facts, "options": {**options, **given}}))
        if message:
            with pytest.raises(ValueError, match=f"checkpoint: precision must be one of fp32, bf16, fp16; .*{message}"):
                settle_precision(TrainOptions(precision="auto"), tmp_path, TWICE, ALONE)
        else:
            assert settle_precision(TrainOptions(precision="auto"), tmp_path, TWICE, ALONE).precision == "fp32"


def test_a_precision_that_the_device_cannot_multiply_is_refused():
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, in which .*; got precision='bf16'"):
        settle_precision(TrainOptions(precision="bf16"), None, {"fp32": 1.0, "fp16": 2.0}, ALONE)


def test_the_main_rank_decides_for_all(monkeypatch):
    monkeypatch.setattr(World, "on_main", lambda self, function: {"precision": "bf16"})
    settled = settle_precision(TrainOptions(precision="auto"), None, HALF, World(1, 2, torch.device("cpu")))
    assert settled == TrainOptions(precision="bf16")


def rates_of_rank():
    engine.matmul_rates = lambda device: TWICE if os.environ["RANK"] == "0" else HALF


@pytest.mark.slow
def test_ranks_of_different_machines_train_in_one_precision(tmp_path):
    given = flags({**SMALL, "num_steps": 2, "output_dir": tmp_path, "name": "two", "precision": "auto"})
    commands = ranks([["train", *given]] * 2, tmp_path, before=rates_of_rank)
    assert [command.end().status for command in commands] == [0, 0]
    assert held(tmp_path / "two") == {"bf16"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_says_the_rates_and_warns_where_another_precision_is_faster(trained, precision):
    rates, other = (TWICE, "bf16") if precision == "fp32" else (HALF, "fp32")
    folder, said = trained("run", rates, precision=precision)
    assert held(folder) == {precision}
    assert f"; {other} trains fastest here\n" in said
    assert f"--precision {other} or auto trains faster\n" in said
