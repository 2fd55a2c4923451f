"""Sharding, compilation, TensorBoard, TF32, and errors of one rank among several."""

import json
import math
import subprocess
from dataclasses import replace

import pytest
import torch

from ffvt.train import engine
from ffvt.train.checkpoint import load_checkpoint, load_state
from ffvt.train.engine import train
from ffvt.train.runlog import read_log
from tests import faults

QUIET = {"dropout": 0.0, "ema_decay": 0.0, "num_steps": 8, "eval_every": 4, "resume": ""}


def launch(run, tmp_path, processes=2):
    return subprocess.run(
        faults.torchrun(processes, faults.flags(run)), capture_output=True, text=True, cwd=tmp_path, timeout=300
    )


def losses(folder, kind="train"):
    return [line["loss"] for line in read_log(folder) if line["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw", "learning_rate": 1e-3, "gradient_accumulation_steps": 2}]
)
def test_a_sharded_run_trains_saves_and_resumes_as_one_process_does(changes, tmp_path):
    alone = train(faults.options(tmp_path, "alone", **{**QUIET, **changes}))
    sharded = faults.options(tmp_path, "sharded", **{**QUIET, **changes}, train_batch_size=4, fsdp=True, save_every=5)
    ran = launch(sharded, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(losses(alone.folder), rel=1e-4)
    assert losses(tmp_path / "sharded", "evaluate") == pytest.approx(losses(alone.folder, "evaluate"), rel=1e-4)
    model = load_checkpoint(tmp_path / "sharded" / "last").model.state_dict()
    expected = load_checkpoint(alone.folder / "last").model.state_dict()
    torch.testing.assert_close(model, expected, rtol=1e-3, atol=1e-5)
    _, state, _ = load_state(tmp_path / "sharded" / "last")
    _, whole, _ = load_state(alone.folder / "last")
    optimizer = [name for name in whole if name.startswith("optimizer/")]
    assert optimizer
    torch.testing.assert_close({n: state[n] for n in optimizer}, {n: whole[n] for n in optimizer}, rtol=1e-2, atol=1e-4)
    again = faults.options(
        tmp_path,
        "again",
        **{**QUIET, **changes, "resume": str(tmp_path / "sharded" / "step-00000005")},
        train_batch_size=4,
        fsdp=True,
    )
    assert (tmp_path / "sharded" / "step-00000005").exists()
    assert launch(again, tmp_path).returncode == 0
    ends = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("sharded", "again")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one_does(tmp_path):
    runs = [train(faults.options(tmp_path, f"compile{on}", **QUIET, compile=on)) for on in (False, True)]
    assert losses(runs[1].folder) == pytest.approx(losses(runs[0].folder), rel=1e-4)
    assert "compiled" not in " ".join(load_checkpoint(runs[1].folder / "last").model.state_dict())


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(faults.options(tmp_path, "run", **QUIET, tensorboard=True))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "evaluate/top1", "evaluate/selection/hit_rate"} <= set(events.Tags()["scalars"])
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(i + 1, pytest.approx(loss)) for i, loss in enumerate(losses(run.folder))]


def test_tf32_is_allowed_only_where_asked_for(tmp_path):
    for allowed, precision in ((True, "high"), (False, "highest")):
        train(faults.options(tmp_path, f"tf32{allowed}", **{**QUIET, "num_steps": 1}, tf32=allowed))
        assert torch.get_float32_matmul_precision() == precision


def test_a_picture_that_only_another_rank_cannot_read_is_told(tmp_path, photographs):
    broken = sorted((photographs / "test").rglob("*.png"))[1]  # of rank 1
    broken.write_bytes(broken.read_bytes()[:50])
    changes = {**QUIET, "dataset": "imagefolder", "data_root": str(photographs), "resize_size": 80, "num_steps": 1}
    ran = launch(faults.options(tmp_path, "run", **changes), tmp_path)
    assert ran.returncode != 0
    assert f"rank 1: evaluate: {broken} cannot be read" in ran.stderr


def test_too_many_steps_that_are_not_finite_end_the_run_with_the_images_names(tmp_path):
    changes = {**QUIET, "learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0, "num_steps": 50}
    with pytest.raises(FloatingPointError, match=r"in 4 steps in a row, the last at step \d+ with image \d+, image"):
        train(faults.options(tmp_path, "run", **{**changes, "eval_every": 100}, max_skipped_steps=3))
    skips = [line for line in read_log(tmp_path / "run") if line["kind"] == "skip"]
    assert len(skips) == 4
    assert len(skips[0]["images"]) == 8
    assert all(json.dumps(line) for line in skips)


def test_an_evaluation_whose_loss_is_not_finite_is_recorded_and_ends_nothing(tmp_path, monkeypatch):
    score = engine._Run._score
    monkeypatch.setattr(engine._Run, "_score", lambda self, *given: replace(score(self, *given), loss=math.nan))
    result = train(faults.options(tmp_path, "run", **QUIET))
    assert losses(result.folder, "evaluate") == [None, None]
    assert load_checkpoint(result.folder / "last").facts["loss"] is None
    monkeypatch.undo()
    again = train(faults.options(tmp_path, "run", **{**QUIET, "resume": "auto"}))
    assert math.isnan(again.last.loss)
