"""The training loop: log and models, best and last, workers, compilation, TensorBoard, numbers that are not finite."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from ffvt import progress
from ffvt.data.datasets import open_split
from ffvt.data.sampling import EvaluationView, TrainingView
from ffvt.train import engine, run_folder
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.evaluate import evaluate
from ffvt.train.flags import parse_training_flags
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log
from tests import faults
from tests.helpers import SMALL, values

ALONE = World(0, 1, torch.device("cpu"))
QUIET = {"dropout": 0.0, "ema_decay": 0.0, "num_steps": 8, "eval_every": 4, "resume": ""}


def test_a_run_writes_its_log_and_its_models_and_repeats_itself(tmp_path):
    results = [train(TrainOptions(**SMALL, output_dir=str(tmp_path / name), name="run")) for name in ("a", "b")]
    logs = [read_log(result.folder) for result in results]
    assert [line["kind"] for line in logs[0]] == ["run", *["train"] * 4, "evaluate", *["train"] * 2, "evaluate", "end"]
    losses = [[line["loss"] for line in log if line["kind"] in ("train", "evaluate")] for log in logs]
    assert losses[0] == losses[1]
    assert [line["lr"] for line in logs[0] if line["kind"] == "train"][:3] == [0.0, 0.015, 0.03]
    assert results[0].last.count == 300
    for kind in ("best", "last"):
        checkpoint = load_checkpoint(results[0].folder / kind)
        assert checkpoint.facts["classes"][0] == "amber-ring"
    view = EvaluationView(open_split("partbirds", "test", 64, 64, preset="easy", seed=42), 64, grid_size=4)
    score = evaluate(checkpoint.model, view, ALONE, 7)
    assert score.per_class == results[0].last.per_class
    assert score.loss == pytest.approx(results[0].last.loss, rel=1e-5)


def test_best_is_the_best_and_evaluations_leave_training_alone(tmp_path):
    changes = {"learning_rate": 0.3, "dropout": 0.1, "num_steps": 12, "warmup_steps": 1}
    logs = []
    for every in (2, 12):
        options = TrainOptions(
            **{**SMALL, **changes, "eval_every": every}, output_dir=str(tmp_path), name=f"every{every}"
        )
        result = train(options)
        logs.append(read_log(result.folder))
        tops = [line["top1"] for line in logs[-1] if line["kind"] == "evaluate"]
        assert result.best.top1 == max(tops)
        assert load_checkpoint(result.folder / "best").facts["top1"] == max(tops)
    losses = [[line["loss"] for line in log if line["kind"] == "train"] for log in logs]
    assert losses[0] == losses[1]


def test_workers_change_nothing(tmp_path, photographs):
    losses = []
    for workers in (0, 2):
        changes = dict(dataset="imagefolder", data_root=str(photographs), resize_size=80, workers=workers, num_steps=3)
        changes |= dict(augment="trivial", random_erasing=0.5, mixup=0.2, cutmix=1.0, balanced_sampling=True)
        result = train(TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path), name=f"w{workers}"))
        losses.append([line["loss"] for line in read_log(result.folder) if "loss" in line])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one_does(tmp_path):
    runs = [train(faults.options(tmp_path, f"compile{on}", **QUIET, compile=on)) for on in (False, True)]
    assert values(runs[1].folder) == pytest.approx(values(runs[0].folder), rel=1e-4)
    assert "compiled" not in " ".join(load_checkpoint(runs[1].folder / "last").model.state_dict())


@pytest.mark.slow
def test_a_compiled_run_is_compiled_once_whatever_batches_come(tmp_path):
    """Not again for evaluation, nor for its last batch, nor for the parts of a batch."""
    torch.compiler.reset()
    changes = dict(feature_fusion=False, ema_decay=0.0, eval_every=2, eval_batch_size=7, num_steps=5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(faults.options(tmp_path, "compiled", compile=True, gradient_accumulation_steps=2, **changes))


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(faults.options(tmp_path, "run", **QUIET, tensorboard=True))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "evaluate/top1", "evaluate/selection/hit_rate"} <= set(events.Tags()["scalars"])
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(i + 1, pytest.approx(loss)) for i, loss in enumerate(values(run.folder))]


def test_tf32_is_allowed_only_where_asked_for(tmp_path):
    for allowed, precision in ((True, "high"), (False, "highest")):
        train(faults.options(tmp_path, f"tf32{allowed}", **{**QUIET, "num_steps": 1}, tf32=allowed))
        assert torch.get_float32_matmul_precision() == precision


def test_too_many_steps_that_are_not_finite_end_the_run_with_the_images_names(tmp_path):
    changes = {**QUIET, "learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0, "num_steps": 50}
    with pytest.raises(FloatingPointError, match=r"in 4 steps in a row, the last at step \d+ with image \d+, image"):
        train(faults.options(tmp_path, "run", **{**changes, "eval_every": 100}, max_skipped_steps=3))
    skips = [line for line in read_log(tmp_path / "run") if line["kind"] == "skip"]
    assert len(skips) == 4
    assert len(skips[0]["images"]) == 8
    assert all(json.dumps(line) for line in skips)


def test_an_error_in_an_evaluation_costs_the_evaluation_and_one_at_the_end_is_made_up_for(tmp_path, monkeypatch):
    whole = train(faults.options(tmp_path, "whole", **QUIET))

    def failing(*_given):
        raise KeyError("odd")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "evaluate", failing)
        with pytest.raises(
            ValueError, match=r"the end must be evaluated; .* saved in .*last, --resume auto evaluates it"
        ):
            train(faults.options(tmp_path, "run", **QUIET))
    assert values(tmp_path / "run", "unevaluated", "step") == [4, 8]
    assert values(tmp_path / "run", "unevaluated", "error") == ["KeyError: 'odd'"] * 2
    again = train(faults.options(tmp_path, "run", **{**QUIET, "resume": "auto"}))
    assert again.last == whole.last
    assert faults.end_of(again.folder)["model.safetensors"] == faults.end_of(whole.folder)["model.safetensors"]


def test_an_error_of_the_loader_saves_before_it_ends_the_run(tmp_path, monkeypatch):
    whole, drawn = TrainingView.__getitem__, []

    def failing(self, key):
        drawn.append(key)
        if len(drawn) > 5 * 8:
            raise OSError("the disk is gone")
        return whole(self, key)

    monkeypatch.setattr(TrainingView, "__getitem__", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        train(faults.options(tmp_path, "run", **{**QUIET, "eval_every": 100}, save_every=100))
    assert load_checkpoint(tmp_path / "run" / "last").facts["step"] == 5


def test_an_evaluation_whose_loss_is_not_finite_is_recorded_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "evaluate", lambda *given: replace(evaluate(*given), loss=math.nan))
    result = train(faults.options(tmp_path, "run", **QUIET))
    assert values(result.folder, "evaluate") == [None, None]
    assert load_checkpoint(result.folder / "last").facts["loss"] is None
    monkeypatch.undo()
    again = train(faults.options(tmp_path, "run", **{**QUIET, "resume": "auto"}))
    assert math.isnan(again.last.loss)


def test_a_run_tells_what_it_trains_and_shows_every_step_where_no_terminal_is(tmp_path, caplog):
    caplog.set_level("INFO", logger="ffvt")
    train(faults.options(tmp_path, "run", **{**QUIET, "num_steps": 3, "eval_every": 3}))
    said = caplog.text
    assert "model: vit_s16, FFVT, 3 tokens picked by each block, 0.0 M parameters, images of 64 pixels" in said
    assert "data: partbirds, 1,500 training, 300 test images, 9 classes" in said
    assert "schedule: 3 steps of 8 images, 0.0 epochs, in fp32 on the CPU" in said
    assert re.search(r"products: fp32 \S+, bf16 \S+, fp16 \S+ [GT]FLOP/s; (fp32|bf16) trains fastest here\n", said)
    assert "note: warmup_steps=4 is not below num_steps=3" in said
    assert [f"step {step} of 3, epoch 0.0" in said for step in (1, 2, 3)] == [True] * 3
    assert "images/s, 0 s left" in said


def test_epochs_decide_the_steps_and_the_config_of_a_run_repeats_it(tmp_path):
    # 1,500 images in batches of 8
    changes = {**QUIET, "epochs": 5 / 187.5, "warmup_epochs": 2 / 187.5, "eval_epochs": 3 / 187.5}
    first = train(faults.options(tmp_path, "first", **changes))
    assert [values(first.folder, kind, "step") for kind in ("train", "evaluate")] == [[1, 2, 3, 4, 5], [3, 5]]
    options = parse_training_flags(["--config", str(first.folder / "config.yaml"), "--name", "second"])
    assert (options.num_steps, options.warmup_steps, options.eval_every) == (5, 2, 3)
    assert values(train(options).folder) == values(first.folder)


def test_early_stopping_ends_a_run_that_finds_no_new_best_and_a_resumed_one_stays_ended(tmp_path):
    changes = {**QUIET, "learning_rate": 1e-30, "num_steps": 40, "eval_every": 2, "early_stopping": 3}
    result = train(faults.options(tmp_path, "run", **changes))
    lines = read_log(result.folder)
    assert [line["step"] for line in lines if line["kind"] == "evaluate"] == [2, 4, 6, 8]
    assert (lines[-1]["kind"], lines[-1]["step"], result.stopped) == ("end", 8, None)
    assert load_checkpoint(result.folder / "last").facts["step"] == 8
    again = train(faults.options(tmp_path, "run", **{**changes, "resume": "auto"}))
    assert again.last.summary() == result.last.summary()
    assert values(again.folder, "train", "step")[-1] == 8


def test_a_run_that_goes_on_from_another_does_not_count_that_ones_steps_as_waiting(tmp_path):
    first = train(faults.options(tmp_path, "first", **QUIET))
    changes = {**QUIET, "num_steps": 12, "early_stopping": 1, "resume": str(first.folder)}
    second = train(faults.options(tmp_path, "second", **changes))
    assert values(second.folder, "train", "step")[-1] == 12
    assert load_checkpoint(second.folder / "last").facts["step"] == 12


def test_a_new_best_that_cannot_be_saved_does_not_end_a_run_that_stops_early(tmp_path, monkeypatch):
    tops = iter([0.2, 0.1, 0.3, 0.4])
    real = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *given: replace(real(*given), top1=next(tops)))
    save, saves = run_folder.save_checkpoint, []

    def full_at_6(folder, step, *given):
        saves.append(step)
        if step == 6:
            raise OSError(28, "No space left on device")
        save(folder, step, *given)

    monkeypatch.setattr(run_folder, "save_checkpoint", full_at_6)
    result = train(faults.options(tmp_path, "run", **{**QUIET, "eval_every": 2, "early_stopping": 2, "save_every": 99}))
    assert saves == [2, 6, 8]
    assert (result.last.top1, result.best.top1) == (0.4, 0.4)


def test_images_that_a_run_replaces_are_in_its_log(tmp_path, photographs):
    path = next((photographs / "train").rglob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    changes = {**QUIET, "dataset": "imagefolder", "data_root": str(photographs), "resize_size": 80, "num_steps": 4}
    result = train(faults.options(tmp_path, "run", **changes, log_every=4, preset="default"))
    (problem,) = values(result.folder, "unreadable", "problem")
    assert path.name in problem


def test_a_long_evaluation_within_training_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    train(faults.options(tmp_path, "run", **{**QUIET, "num_steps": 1, "eval_batch_size": 100}))
    assert capsys.readouterr().err.count("evaluate: ") == 3
