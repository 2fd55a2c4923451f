"""Resuming: exact after kills, stops and damage, alone and under torchrun."""

import logging
import os
import signal
import subprocess
from dataclasses import replace

import pytest

from ffvt.train import engine
from ffvt.train.checkpoint import checkpoints, load_checkpoint
from ffvt.train.engine import train
from ffvt.train.runlog import read_log
from ffvt.train.step import training_step
from tests import faults
from tests.helpers import flags, torchrun, values

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"workers": 2}, id="fp32, workers", marks=SLOW),  # each loader imports PyTorch again
        pytest.param(
            {"precision": "bf16", "optimizer": "adamw", "learning_rate": 1e-3, "layer_decay": 0.8},
            id="bf16",
            marks=SLOW,
        ),
        pytest.param({"precision": "fp16", "loss_scale": 2.0**24, "ema_decay": 0.0}, id="fp16", marks=SLOW),  # skips
        pytest.param(
            {"val_split": 0.1, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
            id="val_split",
            marks=SLOW,
        ),
        pytest.param(
            {
                **dict(augment="trivial", random_erasing=0.5, mixup=0.2, cutmix=1.0),
                **dict(balanced_sampling=True, smoothing_value=0.1, gradient_accumulation_steps=2),
            },
            id="mixed, erased, balanced",
            marks=SLOW,
        ),
    ],
)
def test_a_killed_run_ends_bitwise_as_the_uninterrupted_one(tmp_path, changes):
    assert faults.killed_and_resumed(tmp_path, 2, seed=1, **changes) == 2


def test_the_log_of_a_resumed_run_says_where_it_resumed(tmp_path):
    run = faults.options(tmp_path, "run")
    train(faults.options(tmp_path, "run", num_steps=8))
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # cut off by a kill
    result = train(run)
    lines = read_log(tmp_path / "run")
    kinds = [line["kind"] for line in lines]
    assert kinds.count("run") == 2
    assert lines[kinds.index("resume")]["step"] == 8
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, faults.STEPS + 1))
    assert result.last.count == 300


def test_other_options_and_another_run_can_be_resumed_and_are_named(tmp_path, caplog):
    first = train(faults.options(tmp_path, "first", num_steps=8))
    second = train(faults.options(tmp_path, "second", num_steps=10, learning_rate=0.5, resume=str(first.folder)))
    assert "learning_rate: 0.03 -> 0.5" in caplog.text
    assert "num_steps: 8 -> 10" in caplog.text
    assert [line["step"] for line in read_log(second.folder) if line["kind"] == "train"] == [9, 10]
    assert load_checkpoint(first.folder / "last").facts["step"] == 8
    with pytest.raises(ValueError, match="num_steps must be at least the checkpoint's 10; got num_steps=9"):
        train(faults.options(tmp_path, "second", num_steps=9))
    with pytest.raises(ValueError, match="model must be the checkpoint's; it differs in"):
        train(faults.options(tmp_path, "second", embed_dim=64))
    with pytest.raises(ValueError, match="optimizer must be the checkpoint's; got optimizer='adamw'"):
        train(faults.options(tmp_path, "second", optimizer="adamw"))
    with pytest.raises(ValueError, match="lead to a checkpoint; got resume='nowhere'"):
        train(faults.options(tmp_path, "third", resume="nowhere"))


def test_other_statistics_of_the_weights_are_named_and_refused_where_all_must_be_the_same(
    tmp_path, monkeypatch, caplog
):
    first = train(faults.options(tmp_path, "first", num_steps=2))
    monkeypatch.setattr("ffvt.train.data.image_statistics", lambda *names: ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225)))
    changes = dict(num_steps=2, resume=str(first.folder))
    train(faults.options(tmp_path, "second", **changes))
    assert "mean: [0.485, 0.456, 0.406] -> [0.5, 0.5, 0.5]" in caplog.text
    assert "std:" not in caplog.text
    with pytest.raises(ValueError, match="strict must find .* unchanged; got mean: "):
        train(faults.options(tmp_path, "third", **changes, strict=True))


def test_a_stopped_run_of_mixed_erased_balanced_images_ends_bitwise_as_the_uninterrupted_one(tmp_path, monkeypatch):
    changes = dict(augment="rand", random_erasing=0.5, mixup=0.2, cutmix=1.0, balanced_sampling=True, num_steps=8)
    changes |= dict(gradient_accumulation_steps=2, eval_every=100)
    whole = train(faults.options(tmp_path, "whole", **changes))
    assert faults.end_of(train(faults.options(tmp_path, "plain", num_steps=8)).folder) != faults.end_of(whole.folder)

    def stopping(state, *given):
        return replace(training_step(state, *given), stop=state.step == 3)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "training_step", stopping)
        assert train(faults.options(tmp_path, "stopped", **changes)).stopped == 3
    resumed = train(faults.options(tmp_path, "stopped", **changes))
    assert faults.end_of(resumed.folder) == faults.end_of(whole.folder)
    assert values(resumed.folder) == values(whole.folder)


@SLOW
def test_what_is_mixed_does_not_depend_on_the_number_of_processes(tmp_path):
    """Two processes against one with twice the batch in two parts: each part is mixed alike."""
    changes = dict(num_steps=6, eval_every=100, dropout=0.0, ema_decay=0.0, resume="", balanced_sampling=True)
    changes |= dict(mixup=0.4, cutmix=1.0, random_erasing=0.5, augment="jitter", smoothing_value=0.1)
    both = faults.options(tmp_path, "both", **changes, train_batch_size=4)
    subprocess.run(torchrun(2, flags(both)), check=True, capture_output=True, cwd=tmp_path)
    alone = train(faults.options(tmp_path, "alone", **changes, train_batch_size=8, gradient_accumulation_steps=2))
    for key in ("loss", "accuracy", "grad_norm"):
        assert values(alone.folder, key=key) == pytest.approx(values(tmp_path / "both", key=key), rel=1e-5)


@pytest.mark.slow
def test_another_number_of_processes_sees_the_images_in_the_same_order(tmp_path, caplog):
    """The 2-process run is resumed by one process with twice the batch; without dropout its losses are the same."""
    changes = {"num_steps": 12, "save_every": 6, "eval_every": 100, "dropout": 0.0, "ema_decay": 0.0, "resume": ""}
    both = faults.options(tmp_path, "both", **changes, train_batch_size=4)
    subprocess.run(torchrun(2, flags(both)), check=True, capture_output=True, cwd=tmp_path)
    step6 = str(tmp_path / "both" / "step-00000006")
    alone = train(faults.options(tmp_path, "alone", **{**changes, "resume": step6}, train_batch_size=8))
    losses = [
        [line["loss"] for line in read_log(folder) if line["kind"] == "train" and line["step"] > 6]
        for folder in (tmp_path / "both", alone.folder)
    ]
    assert len(losses[1]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "resuming on 1 processes a run of 2" in caplog.text


def test_sigterm_saves_and_ends_with_status_0(tmp_path):
    run = faults.options(tmp_path, "run", num_steps=2000, eval_every=5000, save_every=5000, workers=1)
    process = subprocess.Popen(
        [*torchrun(1, [])[:1], "-m", "ffvt.train", *flags(run)], stdout=subprocess.PIPE, text=True
    )
    faults.wait_until(lambda: faults.last_step(run) >= 3, "step 3")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    saved = load_checkpoint(tmp_path / "run" / "last").facts["step"]
    assert f"stopped at step {saved} of 2000; --resume auto resumes" in said
    assert read_log(tmp_path / "run")[-1]["kind"] == "stop"
    resumed = train(faults.options(tmp_path, "run", num_steps=saved + 1, eval_every=5000, save_every=5000))
    assert resumed.last.count == 300


@pytest.mark.slow
def test_sigterm_stops_all_ranks_at_one_step(tmp_path):
    run = faults.options(tmp_path, "run", num_steps=5000, eval_every=9000, save_every=9000)
    process = subprocess.Popen(torchrun(2, flags(run)), stdout=subprocess.PIPE, text=True)
    faults.wait_until(lambda: faults.last_step(run) >= 3, "step 3")
    os.kill(faults.children(process.pid)[1], signal.SIGTERM)  # one rank only
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped at step" in said
    assert (tmp_path / "run" / "last").exists()


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_costs_nothing(tmp_path):
    assert faults.worker_killed_under_torchrun(tmp_path)


def test_a_damaged_newest_checkpoint_is_named_set_aside_and_made_again(tmp_path, caplog):
    whole = train(faults.options(tmp_path, "run"))
    expected = faults.end_of(whole.folder)
    damaged = checkpoints(whole.folder)[0]
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000024 is damaged: model\.safetensors does not fit"):
        load_checkpoint(whole.folder / "last")
    train(faults.options(tmp_path, "run"))
    assert "step-00000024 is damaged" in caplog.text
    assert faults.end_of(whole.folder) == expected
    assert (whole.folder / "damaged-step-00000024.1").exists()
    for folder in checkpoints(whole.folder):
        (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="got only damaged ones: step-00000024"):
        train(faults.options(tmp_path, "run"))


def test_a_stop_before_an_evaluation_is_made_up_for(tmp_path, monkeypatch):
    whole = train(faults.options(tmp_path, "whole"))

    def stopping(state, *given):
        return replace(training_step(state, *given), stop=state.step == 10)  # where an evaluation is due

    with monkeypatch.context() as patched:
        patched.setattr(engine, "training_step", stopping)
        stopped = train(faults.options(tmp_path, "stopped"))
    assert stopped.stopped == 10
    assert not [line for line in read_log(stopped.folder) if line["kind"] == "evaluate"]
    train(faults.options(tmp_path, "stopped"))
    assert faults.end_of(stopped.folder) == faults.end_of(whole.folder)
    scores = [[line for line in read_log(run.folder) if line["kind"] == "evaluate"] for run in (whole, stopped)]
    assert scores[0] == scores[1]


@SLOW
def test_a_worker_killed_before_the_first_checkpoint_costs_nothing(tmp_path):
    """The restarted processes begin as they did, although an earlier run of the name is there."""
    train(faults.options(tmp_path, "disturbed", num_steps=1))
    assert faults.worker_killed_under_torchrun(tmp_path, at_step=2, save_every=1000, eval_every=1000)
    assert (tmp_path / "disturbed.1").exists()


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog):
    caplog.set_level(logging.INFO, logger="ffvt")


def test_a_run_counted_in_epochs_keeps_its_batch(tmp_path):
    changes = {"num_steps": 8, "epochs": 8 / 187.5}  # 1,500 images in batches of 8
    first = train(faults.options(tmp_path, "first", **changes))
    again = {**changes, "train_batch_size": 16, "resume": str(first.folder)}
    with pytest.raises(ValueError, match=r"the checkpoint's 8 with epochs; got train_batch_size \* processes=16"):
        train(faults.options(tmp_path, "second", **again))
