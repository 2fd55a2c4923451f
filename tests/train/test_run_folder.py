"""A run's folder: one writer, earlier runs kept, links mended, checkpoints that cannot be written."""

import logging
import shutil
from dataclasses import replace

import pytest

from ffvt.train import checkpoint as checkpoint_module
from ffvt.train import engine, run_folder
from ffvt.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ffvt.train.engine import train
from ffvt.train.evaluate import evaluate
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log
from ffvt.train.step import training_step
from tests import faults
from tests.helpers import SMALL


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


def test_a_copied_run_whose_links_became_folders_resumes(tmp_path):
    run = train(faults.options(tmp_path, "run", num_steps=8))
    shutil.copytree(run.folder, tmp_path / "copy")  # follows the links
    train(faults.options(tmp_path, "copy", num_steps=12))
    assert load_checkpoint(tmp_path / "copy" / "last").facts["step"] == 12
    assert (tmp_path / "copy" / "copied-last.1").is_dir()


def test_going_back_sets_later_checkpoints_aside_once_the_options_are_found_right(tmp_path):
    run = train(faults.options(tmp_path, "run"))
    step20 = str(run.folder / "step-00000020")
    with pytest.raises(ValueError, match="num_steps must be at least the checkpoint's 20; got num_steps=5"):
        train(faults.options(tmp_path, "run", resume=step20, num_steps=5))
    assert load_checkpoint(run.folder / "last").facts["step"] == 24
    train(faults.options(tmp_path, "run", resume=step20, num_steps=22))
    assert load_checkpoint(run.folder / "superseded-step-00000024.1").facts["step"] == 24
    assert load_checkpoint(run.folder / "last").facts["step"] == 22


def test_a_run_that_is_resumed_elsewhere_has_a_best_of_its_own(tmp_path):
    first = train(faults.options(tmp_path, "first", val_split=0.1, num_steps=10))
    second = train(faults.options(tmp_path, "second", val_split=0.1, num_steps=12, resume=str(first.folder / "last")))
    assert load_checkpoint(second.folder / "best").facts["step"] == 12
    assert second.best.count == 300
    (first.folder / "last").resolve().rename(first.folder / "mine")
    with pytest.raises(ValueError, match="name must not be that of the run in which resume="):
        train(faults.options(tmp_path, "first", resume=str(first.folder / "mine")))


def test_a_full_disk_is_a_warning_until_the_end_and_the_old_checkpoint_stays(tmp_path):
    try:
        assert faults.full_disk(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_checkpoint_that_cannot_be_written_fails_the_run_only_where_it_is_the_last(tmp_path, monkeypatch, caplog):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="checkpoint of step 5 could not be written"):
        train(faults.options(tmp_path, "run", num_steps=5))
    assert "the checkpoint of step 4 could not be written, training continues" in caplog.text
    folder = tmp_path / "run"
    assert checkpoints(folder) == []
    assert not list(folder.glob(".step-*"))
    assert [line["step"] for line in read_log(folder) if line["kind"] == "unsaved"] == [4]
    assert [line["kind"] for line in read_log(folder)][-1] == "evaluate"  # the last score is not lost
    monkeypatch.setattr(engine, "training_step", lambda *given: replace(training_step(*given), stop=True))
    with pytest.raises(OSError, match="checkpoint of step 1 could not be written"):
        train(faults.options(tmp_path, "asked", num_steps=5))


def test_a_best_model_that_could_not_be_saved_does_not_count(tmp_path, monkeypatch):
    tops = iter([0.1, 0.9, 0.5])

    def full_at_20(run, step, *given):
        if step == 20:
            raise OSError(28, "No space left on device")
        return save_checkpoint(run, step, *given)

    monkeypatch.setattr(engine, "evaluate", lambda *given: replace(evaluate(*given), top1=next(tops, 0.3)))
    monkeypatch.setattr(run_folder, "save_checkpoint", full_at_20)
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


def test_a_new_run_of_the_same_name_keeps_the_earlier_one_unless_told(tmp_path):
    for changes in ({}, {"seed": 1}, {"overwrite": True, "seed": 2}):
        result = train(TrainOptions(**{**SMALL, "num_steps": 2}, output_dir=str(tmp_path), **changes))
        assert read_log(result.folder)[0]["options"]["seed"] == changes.get("seed", 42)
        assert [line["kind"] for line in read_log(result.folder)].count("run") == 1
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["ffvt", "ffvt.1"]
    assert load_checkpoint(tmp_path / "ffvt.1" / "last").facts["options"]["seed"] == 42


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(caplog):
    caplog.set_level(logging.INFO, logger="ffvt")
