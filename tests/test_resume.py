"""Checkpoints and resuming: exact after kills, whole or refused, kept and deleted as they should be."""

import json
import logging
import os
import signal
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import faults
from ffvt.train import checkpoint as checkpoint_module
from ffvt.train import engine
from ffvt.train.checkpoint import checkpoints, load_checkpoint, load_state, newest_whole, save_checkpoint
from ffvt.train.engine import train
from tests.helpers import tiny_model
from tests.test_train import read_log

FACTS = {"classes": list("abcde"), "resize_size": 64, "options": {}}


def save(run, step, is_best=False, facts=FACTS, **state):
    tensors = {"values": torch.full((3,), float(step))}
    model = tiny_model()
    return save_checkpoint(run, step, model.save_pretrained, {**facts, "step": step}, tensors, state, is_best)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32", "workers": 2},
        {"precision": "bf16", "optimizer": "adamw", "learning_rate": 1e-3, "layer_decay": 0.8},
        {"precision": "fp16", "loss_scale": 2.0**24, "ema_decay": 0.0},  # skips steps first
        {"val_split": 0.1, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=["fp32", "bf16", "fp16", "val_split"],
)
def test_a_killed_run_ends_bitwise_as_the_uninterrupted_one(tmp_path, changes):
    assert faults.killed_and_resumed(tmp_path, 2, seed=1, **changes) == 2


def test_the_log_of_a_resumed_run_tells_where_it_went_on(tmp_path):
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
        train(faults.options(tmp_path, "second", embed_dim=32))
    with pytest.raises(ValueError, match="optimiser must be the checkpoint's; got optimizer='adamw'"):
        train(faults.options(tmp_path, "second", optimizer="adamw"))
    with pytest.raises(ValueError, match="lead to a checkpoint; got resume='nowhere'"):
        train(faults.options(tmp_path, "third", resume="nowhere"))


def test_another_number_of_processes_sees_the_images_in_the_same_order(tmp_path, caplog):
    """The 2-process run is resumed by one process with twice the batch; without dropout its losses are the same."""
    changes = {"num_steps": 12, "save_every": 6, "eval_every": 100, "dropout": 0.0, "ema_decay": 0.0, "resume": ""}
    both = faults.options(tmp_path, "both", **changes, train_batch_size=4)
    subprocess.run(faults.torchrun(2, faults.flags(both)), check=True, capture_output=True, cwd=tmp_path)
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
        [*faults.torchrun(1, [])[:1], "-m", "ffvt.train", *faults.flags(run)], stdout=subprocess.PIPE, text=True
    )
    faults.wait_until(lambda: faults.last_step(run) >= 3, "step 3")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    saved = load_checkpoint(tmp_path / "run" / "last").facts["step"]
    assert f"stopped at step {saved}, --resume auto goes on" in said
    assert read_log(tmp_path / "run")[-1]["kind"] == "stop"
    resumed = train(faults.options(tmp_path, "run", num_steps=saved + 1, eval_every=5000, save_every=5000))
    assert resumed.last.count == 300


def test_sigterm_stops_all_ranks_at_one_step(tmp_path):
    run = faults.options(tmp_path, "run", num_steps=5000, eval_every=9000, save_every=9000)
    process = subprocess.Popen(faults.torchrun(2, faults.flags(run)), stdout=subprocess.PIPE, text=True)
    faults.wait_until(lambda: faults.last_step(run) >= 3, "step 3")
    os.kill(faults.children(process.pid)[1], signal.SIGTERM)  # one rank only
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped at step" in said
    assert (tmp_path / "run" / "last").exists()


def test_a_worker_killed_under_torchrun_costs_nothing(tmp_path):
    assert faults.worker_killed_under_torchrun(tmp_path)


def test_kills_while_saving_leave_the_newest_checkpoint_whole(tmp_path):
    loadable, interrupted = faults.killed_while_saving(tmp_path, 6)
    assert loadable == 6
    assert interrupted > 0  # or nothing was tested


def test_any_changed_byte_is_noticed_and_the_previous_checkpoint_is_taken(tmp_path):
    assert faults.flipped_bytes(tmp_path, 12) == 12


def test_a_damaged_newest_checkpoint_is_named_set_aside_and_made_again(tmp_path, caplog):
    whole = train(faults.options(tmp_path, "run"))
    expected = faults.end_of(whole.folder)
    damaged = checkpoints(whole.folder)[0]
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"last is damaged: model\.safetensors does not fit"):
        load_checkpoint(whole.folder / "last")
    train(faults.options(tmp_path, "run"))
    assert "step-00000024 is damaged" in caplog.text
    assert faults.end_of(whole.folder) == expected
    assert (whole.folder / "damaged-step-00000024").exists()
    for folder in checkpoints(whole.folder):
        (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="got only damaged ones: step-00000024"):
        train(faults.options(tmp_path, "run"))


def test_a_full_disk_is_a_warning_and_the_old_checkpoint_stays(tmp_path):
    try:
        assert faults.full_disk(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_checkpoint_that_cannot_be_written_stops_nothing_but_sigterm(tmp_path, monkeypatch, caplog):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    result = train(faults.options(tmp_path, "run", num_steps=5))
    assert "the checkpoint of step 4 could not be written, training goes on" in caplog.text
    assert result.last.count == 300
    assert checkpoints(result.folder) == []
    assert not list(result.folder.glob(".step-*"))
    assert [line["step"] for line in read_log(result.folder) if line["kind"] == "unsaved"] == [4, 5]
    step = engine.training_step
    monkeypatch.setattr(engine, "training_step", lambda *given: replace(step(*given), stop=True))
    with pytest.raises(OSError, match="checkpoint of step 1 could not be written"):
        train(faults.options(tmp_path, "asked", num_steps=5))


def test_the_two_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, is_best=step == 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000004", "step-00000002"]
    assert load_checkpoint(tmp_path / "best").facts["step"] == 2
    assert load_checkpoint(tmp_path / "last").facts["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("step-")) == ["best", "last"]
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "last", capture_output=True
    )
    assert sums.returncode == 0
    assert sums.stdout.count(b": OK") == 5


def test_a_checkpoint_is_refused_where_it_is_none_or_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        load_checkpoint(tmp_path)
    assert newest_whole(tmp_path) is None
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 2, facts={**FACTS, "loss": float("nan")})
    assert load_checkpoint(tmp_path / "last").facts["step"] == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    save(tmp_path, 3, facts={**FACTS, "classes": ["a"]})
    with pytest.raises(ValueError, match="names 1 classes, its model has 5"):
        load_checkpoint(tmp_path / "last")
    for extra in ("", "0" * 64 + "  model.safetensors\n"):
        sums = (tmp_path / "last" / "SHA256SUMS").read_text()
        (tmp_path / "last" / "SHA256SUMS").write_text(extra + sums.replace("model", "other"))
        with pytest.raises(ValueError, match="last is damaged"):
            load_checkpoint(tmp_path / "last")


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    result = train(faults.options(tmp_path, "run", num_steps=4))
    for path in (result.folder / "last").iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".safetensors":
            assert content[8:9] == b"{"
        else:
            assert path.name == "SHA256SUMS"
    model, tensors, state = load_state(result.folder / "last")
    assert state["samples"] == 4 * 8
    assert set(model) == {name.removeprefix("model/") for name in tensors if name.startswith("model/")}


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog):
    caplog.set_level(logging.INFO, logger="ffvt")
