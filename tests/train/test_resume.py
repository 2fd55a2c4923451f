"""Checkpoints and resuming: exact after kills, whole or refused, kept and deleted as they should be."""

import json
import logging
import os
import shutil
import signal
import subprocess
from dataclasses import replace

import pytest
import torch

from ffvt.train import checkpoint as checkpoint_module
from ffvt.train import engine
from ffvt.train.checkpoint import checkpoints, load_checkpoint, load_state, newest_whole, save_checkpoint
from ffvt.train.engine import train
from ffvt.train.runlog import read_log
from tests import faults
from tests.helpers import tiny_model

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
    assert (whole.folder / "damaged-step-00000024.1").exists()
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


def test_a_run_that_goes_on_elsewhere_has_a_best_of_its_own(tmp_path):
    first = train(faults.options(tmp_path, "first", val_split=0.1, num_steps=10))
    second = train(faults.options(tmp_path, "second", val_split=0.1, num_steps=12, resume=str(first.folder / "last")))
    assert load_checkpoint(second.folder / "best").facts["step"] == 12
    assert second.best.count == 300
    (first.folder / "last").resolve().rename(first.folder / "mine")
    with pytest.raises(ValueError, match="name must not be that of the run in which resume="):
        train(faults.options(tmp_path, "first", resume=str(first.folder / "mine")))


def test_going_back_sets_later_checkpoints_aside_once_the_options_are_found_right(tmp_path):
    run = train(faults.options(tmp_path, "run"))
    step20 = str(run.folder / "step-00000020")
    with pytest.raises(ValueError, match="num_steps must be at least the checkpoint's 20; got num_steps=5"):
        train(faults.options(tmp_path, "run", resume=step20, num_steps=5))
    assert load_checkpoint(run.folder / "last").facts["step"] == 24
    train(faults.options(tmp_path, "run", resume=step20, num_steps=22))
    assert load_checkpoint(run.folder / "superseded-step-00000024.1").facts["step"] == 24
    assert load_checkpoint(run.folder / "last").facts["step"] == 22


def test_links_that_a_kill_left_behind_are_mended(tmp_path):
    run = train(faults.options(tmp_path, "run", val_split=0.1))
    expected = (run.folder / "best").readlink()
    (run.folder / "best").unlink()
    (run.folder / "last").unlink()
    (run.folder / ".step-00000028.new").mkdir()
    train(faults.options(tmp_path, "run", val_split=0.1))
    assert (run.folder / "best").readlink() == expected
    assert load_checkpoint(run.folder / "last").facts["step"] == 24
    assert not list(run.folder.glob(".step-*"))


def test_a_copied_run_whose_links_became_folders_goes_on(tmp_path):
    run = train(faults.options(tmp_path, "run", num_steps=8))
    shutil.copytree(run.folder, tmp_path / "copy")  # follows the links
    train(faults.options(tmp_path, "copy", num_steps=12))
    assert load_checkpoint(tmp_path / "copy" / "last").facts["step"] == 12
    assert (tmp_path / "copy" / "copied-last.1").is_dir()


def test_a_stop_before_an_evaluation_is_made_up_for(tmp_path, monkeypatch):
    whole = train(faults.options(tmp_path, "whole"))
    step = engine.training_step

    def stopping(state, *given):
        return replace(step(state, *given), stop=state.step == 10)  # where an evaluation is due

    with monkeypatch.context() as patched:
        patched.setattr(engine, "training_step", stopping)
        stopped = train(faults.options(tmp_path, "stopped"))
    assert stopped.stopped == 10
    assert not [line for line in read_log(stopped.folder) if line["kind"] == "evaluate"]
    train(faults.options(tmp_path, "stopped"))
    assert faults.end_of(stopped.folder) == faults.end_of(whole.folder)
    scores = [[line for line in read_log(run.folder) if line["kind"] == "evaluate"] for run in (whole, stopped)]
    assert scores[0] == scores[1]


def test_a_best_model_that_could_not_be_saved_does_not_count(tmp_path, monkeypatch):
    save, tops = engine.save_checkpoint, iter([0.1, 0.9, 0.5])

    def full_at_20(run, step, *given):
        if step == 20:
            raise OSError(28, "No space left on device")
        return save(run, step, *given)

    score = engine._Run._score
    monkeypatch.setattr(engine._Run, "_score", lambda self, *given: replace(score(self, *given), top1=next(tops, 0.3)))
    monkeypatch.setattr(engine, "save_checkpoint", full_at_20)
    result = train(faults.options(tmp_path, "run", val_split=0.1))
    assert load_checkpoint(result.folder / "best").facts["step"] == 24
    assert result.best.top1 == 0.3  # the last model's on the test set


def test_other_classes_are_refused(tmp_path, photographs):
    changes = {"dataset": "imagefolder", "data_root": str(photographs), "resize_size": 80, "num_steps": 4}
    train(faults.options(tmp_path, "run", **changes))
    for split in ("train", "test"):
        (photographs / split / "a").rename(photographs / split / "z")
    with pytest.raises(ValueError, match=r"classes must be the checkpoint's; got \['b', 'c', 'z'\]"):
        train(faults.options(tmp_path, "run", **changes))


def test_two_processes_do_not_write_one_run(tmp_path):
    run = faults.options(tmp_path, "run", num_steps=3000, eval_every=5000)
    process = faults.CONTEXT.Process(target=train, args=(run,))
    process.start()
    faults.wait_until(lambda: faults.last_step(run) >= 1, "a step")
    with pytest.raises(ValueError, match=r"\.run\.lock must be free; another process writes this run"):
        train(run)
    process.kill()
    process.join()
    assert train(replace(run, num_steps=faults.last_step(run) + 1)).last.count == 300


def test_overwriting_leaves_what_is_not_a_checkpoint(tmp_path):
    run = train(faults.options(tmp_path, "run", num_steps=4))
    (run.folder / "step-00000004" / "thesis.txt").write_text("mine")
    (run.folder / "notes.txt").write_text("mine")
    train(faults.options(tmp_path, "run", num_steps=4, resume="", overwrite=True))
    assert (run.folder / "kept-step-00000004.1" / "thesis.txt").read_text() == "mine"
    assert (run.folder / "notes.txt").exists()


def test_a_worker_killed_before_the_first_checkpoint_costs_nothing(tmp_path):
    """The restarted processes begin as they did, although an earlier run of the name is there."""
    train(faults.options(tmp_path, "disturbed", num_steps=1))
    assert faults.worker_killed_under_torchrun(tmp_path, at_step=2, save_every=1000, eval_every=1000)
    assert (tmp_path / "disturbed.1").exists()


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog):
    caplog.set_level(logging.INFO, logger="ffvt")
