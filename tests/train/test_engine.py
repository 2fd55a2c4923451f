"""The trainer: options, schedules, steps, distributed equality, exact evaluation, checkpoints, faults."""

import subprocess

import pytest
import torch

from ffvt.data.datasets import open_split
from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import PLAIN, normalize
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.evaluate import evaluate
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions, parse_training_flags
from ffvt.train.runlog import read_log
from ffvt.train.state import TrainState, build_model
from ffvt.train.step import training_step
from tests.faults import flags, torchrun
from tests.helpers import AUTHORS_COMMANDS, SMALL, tiny_model

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("command", AUTHORS_COMMANDS.values(), ids=AUTHORS_COMMANDS)
def test_the_authors_command_lines_parse_to_their_recipes(command):
    options = parse_training_flags(command.split())
    assert options.autocast_precision == "fp16"
    assert options.feature_fusion
    assert (options.weight_decay, options.warmup_steps, options.max_grad_norm, options.seed) == (0.0, 500, 1.0, 42)
    assert (options.smoothing_value, options.gradient_accumulation_steps, options.eval_batch_size) == (0.0, 1, 16)
    assert options.num_token == (24 if "num_token" in command else 12)
    assert (options.last_block, options.first_candidate, options.dropout) == ("random", 0, 0.1)


def test_every_flag_of_the_contract_parses():
    rest = (
        "--eval_batch_size 4 --weight_decay 0.1 --warmup_steps 3 --smoothing_value 0.1 --gradient_accumulation_steps 2 "
    )
    rest += (
        "--max_grad_norm 2 --seed 1 --data_root D --output_dir O --loss_scale 1024 --num_token 3 --decay_type linear"
    )
    options = parse_training_flags(rest.split())
    assert (options.loss_scale, options.gradient_accumulation_steps, options.data_root) == (1024.0, 2, "D")
    assert parse_training_flags(["--local_rank", "1", "--fp16_opt_level", "O2"]) == TrainOptions()
    with pytest.raises(ValueError, match="got precision='float16'"):
        TrainOptions(precision="float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_batch_size", "6", "--gradient_accumulation_steps", "4"], "got train_batch_size=6"),
        (["--num_steps", "0"], "got num_steps=0"),
        (["--learning_rate", "-1"], "got learning_rate=-1.0"),
        (["--smoothing_value", "1"], "got smoothing_value=1.0"),
        (["--fp16", "--precision", "bf16"], "got precision='bf16'"),
        (["--dataset", "imagenet"], "imagenet"),
        (["--max_grad_norm", "inf"], "max_grad_norm must be finite; got max_grad_norm=inf"),
        (["--name", ".."], "got name='..'"),
        (["--name", ""], "got name=''"),
        (["--name", "/elsewhere"], "got name='/elsewhere'"),
        (["--fsdp", "--fp16"], "precision must be bf16 or fp32 with fsdp=True"),
        (["--resume", "auto", "--overwrite"], "overwrite must be left out with resume='auto'"),
        (["--val_split", "1.5"], "got val_split=1.5"),
    ],
)
def test_bad_options_end_with_a_usage_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_training_flags(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_warm_up_from_zero_and_end_at_zero(decay):
    optimizer = make_optimizer("sgd", torch.nn.Linear(1, 1), 2.0, 0.0)
    scheduler = make_scheduler(optimizer, decay, 4, 12)
    rates = []
    for step in range(13):
        rates.append(scheduler.get_last_lr()[0])
        resumed = make_scheduler(make_optimizer("sgd", torch.nn.Linear(1, 1), 2.0, 0.0), decay, 4, 12, done=step)
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="got decay_type='step'"):
        make_scheduler(optimizer, "step", 1, 2)
    with pytest.raises(ValueError, match="got optimizer='lamb'"):
        make_optimizer("lamb", torch.nn.Linear(1, 1), 1.0, 0.0)


def test_adamw_decays_matrices_only():
    model = tiny_model()
    groups = make_optimizer("adamw", model, 1e-3, 0.05).param_groups
    decayed, plain = sorted(groups, key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 0.05 for group in make_optimizer("sgd", model, 1e-3, 0.05).param_groups)


def test_layer_decay_lowers_the_rate_block_by_block():
    model = tiny_model()  # 3 selecting blocks and the last one
    rates = {}
    for group in make_optimizer("adamw", model, 1.0, 0.05, layer_decay=0.5).param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    names = {name: rates[parameter] for name, parameter in model.named_parameters()}
    assert names["head.weight"] == names["norm.bias"] == 1.0
    assert names["last_block.mlp.fc1.weight"] == 0.5
    assert [names[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [1 / 16, 1 / 8, 1 / 4]
    assert names["patch_embed.proj.weight"] == names["cls_token"] == names["pos_embed"] == 1 / 32


def one_step(head_std=0.0, poison=None, **changes):
    """loss, gradient norm, state, images of one SGD step at rate 0.1 on 8 random images."""
    options = {"learning_rate": 0.1, "warmup_steps": 0, "num_steps": 10, **changes}
    state = TrainState(TrainOptions(**{**SMALL, **options}), ALONE, 9)
    torch.nn.init.normal_(state.model.head.weight, std=head_std)
    torch.manual_seed(1)
    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    if poison:
        state.model.head.bias.register_hook(lambda gradient: gradient * poison)
    result = training_step(state, images, labels, None, PLAIN)
    return result.loss, result.norm, state, images


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    whole, parts = one_step(), one_step(gradient_accumulation_steps=4)
    torch.testing.assert_close(whole[:2], parts[:2])
    torch.testing.assert_close(list(whole[2].model.parameters()), list(parts[2].model.parameters()))


def test_gradients_are_clipped_after_unscaling_and_labels_smoothed():
    plain, clipped = one_step(max_grad_norm=0.0), one_step(max_grad_norm=1e-3)
    start = build_model_like()
    torch.testing.assert_close(plain[1], clipped[1])
    moved = torch.cat([(a - b).flatten() for a, b in zip(clipped[2].model.parameters(), start.parameters())])
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # learning rate times the clipped norm
    scaled = one_step(precision="fp16", loss_scale=2.0**12, max_grad_norm=1e-3)
    torch.testing.assert_close(scaled[1], plain[1], rtol=2e-2, atol=0)
    smoothed = one_step(smoothing_value=0.3, head_std=1.0)[0]
    assert smoothed.item() != pytest.approx(one_step(head_std=1.0)[0].item(), rel=1e-3)
    logits = build_model_like(head_std=1.0)(normalize(plain[3]))
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(8), label_smoothing=0.3)
    torch.testing.assert_close(smoothed, expected.detach())


def build_model_like(head_std=0.0):
    torch.manual_seed(TrainOptions.seed)
    model = build_model(TrainOptions(**SMALL), 9)
    torch.manual_seed(TrainOptions.seed)
    torch.nn.init.normal_(model.head.weight, std=head_std)
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_stay_near_fp32(precision):
    low, full = one_step(precision=precision), one_step()
    torch.testing.assert_close(low[0], full[0], rtol=2e-2, atol=2e-2)
    assert all(p.isfinite().all() for p in low[2].model.parameters())


@pytest.mark.parametrize(("precision", "poison"), [("fp16", None), ("fp32", float("nan")), ("bf16", float("inf"))])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(precision, poison):
    scale = {"loss_scale": 2.0**60} if precision == "fp16" else {}  # the scaled gradients overflow
    _, _, state, _ = one_step(precision=precision, poison=poison, ema_decay=0.9, **scale)
    assert (state.step, state.samples, state.skipped, state.skipped_in_a_row) == (1, 8, 1, 1)
    assert state.scheduler.last_epoch == 0
    assert state.scaler.get_scale() == (2.0**59 if precision == "fp16" else 1.0)
    start = build_model_like()
    assert all(torch.equal(a, b) for a, b in zip(state.model.blocks.parameters(), start.blocks.parameters()))
    assert int(state.ema.n_averaged) == 0
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_average_of_the_weights_is_what_is_evaluated():
    state = one_step(ema_decay=0.75, num_steps=5)[2]
    first = [p.detach().clone() for p in state.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(state.evaluated.parameters(), first))  # of one step so far
    training_step(state, torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8), None, PLAIN)
    expected = [0.75 * a + 0.25 * b for a, b in zip(first, state.model.parameters())]
    torch.testing.assert_close(list(state.evaluated.parameters()), expected)
    assert not torch.equal(first[0], next(state.model.parameters()))


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


def test_a_new_run_of_the_same_name_keeps_the_earlier_one_unless_told(tmp_path):
    for changes in ({}, {"seed": 1}, {"overwrite": True, "seed": 2}):
        result = train(TrainOptions(**{**SMALL, "num_steps": 2}, output_dir=str(tmp_path), **changes))
        assert read_log(result.folder)[0]["options"]["seed"] == changes.get("seed", 42)
        assert [line["kind"] for line in read_log(result.folder)].count("run") == 1
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["ffvt", "ffvt.1"]
    assert load_checkpoint(tmp_path / "ffvt.1" / "last").facts["options"]["seed"] == 42


def test_workers_change_nothing(tmp_path, photographs):
    losses = []
    for workers in (0, 2):
        changes = dict(dataset="imagefolder", data_root=str(photographs), resize_size=80, workers=workers, num_steps=3)
        result = train(TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path), name=f"w{workers}"))
        losses.append([line["loss"] for line in read_log(result.folder) if "loss" in line])
    assert losses[0] == losses[1]


def test_two_processes_train_as_one_does_and_count_every_image_once(tmp_path):
    """gloo, fp32: the losses of 2 ranks with batch 4 are those of 1 rank with batch 8, to 1e-5."""
    options = {**SMALL, "output_dir": tmp_path, "num_steps": 8, "learning_rate": 0.1}
    two = flags({**options, "name": "two", "train_batch_size": 4, "eval_batch_size": 7})
    ran = subprocess.run(torchrun(2, two), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr
    train(TrainOptions(**{**options, "name": "one", "output_dir": str(tmp_path)}))
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert two[0]["world_size"] == 2
    for kind in ("train", "evaluate"):
        expected = [line["loss"] for line in one if line["kind"] == kind]
        assert [line["loss"] for line in two if line["kind"] == kind] == pytest.approx(expected, rel=1e-5)
    assert [line["count"] for line in two if line["kind"] == "evaluate"] == [300, 300]
    assert "last: top-1" in ran.stdout
    assert ran.stdout.count("last: top-1") == 1
