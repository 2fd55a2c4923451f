"""The trainer: options, schedules, steps, distributed equality, exact evaluation, checkpoints, faults."""

import json
import subprocess
import sys

import pytest
import torch

from ffvt.data.datasets import EvaluationView, open_split
from ffvt.data.transforms import normalize
from ffvt.train.checkpoint import load_checkpoint, save_checkpoint
from ffvt.train.distributed import World
from ffvt.train.engine import build_model, make_scaler, train, training_step
from ffvt.train.evaluate import evaluate
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions, parse_training_flags
from tests.helpers import tiny_model

ALONE = World(0, 1, torch.device("cpu"))
SMALL = dict(dataset="partbirds", preset="easy", img_size=64, resize_size=64, patch_size=16, embed_dim=32, depth=3)
SMALL |= dict(num_heads=2, mlp_dim=32, num_token=3, feature_fusion=True, dropout=0.0, workers=0, model_type="vit_s16")
SMALL |= dict(
    train_batch_size=8, eval_batch_size=50, num_steps=6, warmup_steps=2, eval_every=4, log_every=1, device="cpu"
)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def flags(options):
    given = []
    for name, value in options.items():
        given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return given


AUTHORS_COMMANDS = {
    "cotton": "--name N --dataset cotton --model_type ViT-B_16 --pretrained_dir P --img_size 384 --resize_size 500 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 2000 --fp16 --eval_every 16 --feature_fusion",
    "soyloc": "--name N --dataset soyloc --model_type ViT-B_16 --pretrained_dir P --img_size 384 --resize_size 500 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 4750 --fp16 --eval_every 50 --feature_fusion",
    "CUB": "--name N --dataset CUB --model_type ViT-B_16 --pretrained_dir P --img_size 448 --resize_size 600 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 10000 --fp16 --eval_every 200 --feature_fusion",
    "dogs": "--name N --dataset CUB --model_type ViT-B_16 --pretrained_dir P --img_size 448 --resize_size 600 "
    "--train_batch_size 4 --learning_rate 3e-3 --num_steps 30000 --fp16 --eval_every 300 --feature_fusion "
    "--decay_type linear --num_token 24",
}


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
    ],
)
def test_bad_options_end_with_a_usage_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_training_flags(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_warm_up_from_zero_and_end_at_zero(decay):
    optimizer = make_optimizer("sgd", [torch.nn.Parameter(torch.zeros(1))], 2.0, 0.0)
    scheduler = make_scheduler(optimizer, decay, 4, 12)
    rates = []
    for _ in range(13):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="got decay_type='step'"):
        make_scheduler(optimizer, "step", 1, 2)
    with pytest.raises(ValueError, match="got optimizer='lamb'"):
        make_optimizer("lamb", [], 1.0, 0.0)


def test_adamw_decays_matrices_only():
    model = tiny_model()
    decayed, plain = make_optimizer("adamw", model.parameters(), 1e-3, 0.05).param_groups
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def one_step(head_std=0.0, **changes):
    """loss, gradient norm, model, scheduler, scaler, images of one SGD step at rate 0.1 on 8 random images."""
    options = TrainOptions(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = build_model(options, 9)
    torch.nn.init.normal_(model.head.weight, std=head_std)
    torch.manual_seed(1)
    optimizer = make_optimizer("sgd", model.parameters(), 0.1, 0.0)
    scheduler = make_scheduler(optimizer, "cosine", 0, 10)
    scaler = make_scaler(options, ALONE)
    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    loss, norm = training_step(model, optimizer, scheduler, scaler, images, labels, options, ALONE)
    return loss, norm, model, scheduler, scaler, images


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    whole, parts = one_step(), one_step(gradient_accumulation_steps=4)
    torch.testing.assert_close(whole[:2], parts[:2])
    torch.testing.assert_close(list(whole[2].parameters()), list(parts[2].parameters()))


def test_gradients_are_clipped_after_unscaling_and_labels_smoothed():
    plain, clipped = one_step(max_grad_norm=0.0), one_step(max_grad_norm=1e-3)
    start = build_model_like(plain)
    torch.testing.assert_close(plain[1], clipped[1])
    moved = torch.cat([(a - b).flatten() for a, b in zip(clipped[2].parameters(), start.parameters())])
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # learning rate times the clipped norm
    scaled = one_step(precision="fp16", loss_scale=2.0**12, max_grad_norm=1e-3)
    torch.testing.assert_close(scaled[1], plain[1], rtol=2e-2, atol=0)
    smoothed = one_step(smoothing_value=0.3, head_std=1.0)[0]
    assert smoothed.item() != pytest.approx(one_step(head_std=1.0)[0].item(), rel=1e-3)
    logits = build_model_like(plain, head_std=1.0)(normalize(plain[5]))
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(8), label_smoothing=0.3)
    torch.testing.assert_close(smoothed, expected.detach())


def build_model_like(step, head_std=0.0):
    torch.manual_seed(0)
    model = build_model(TrainOptions(**SMALL), 9)
    torch.nn.init.normal_(model.head.weight, std=head_std)
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_stay_near_fp32(precision):
    low, full = one_step(precision=precision), one_step()
    torch.testing.assert_close(low[0], full[0], rtol=2e-2, atol=2e-2)
    assert all(p.isfinite().all() for p in low[2].parameters())


def test_a_skipped_fp16_step_does_not_advance_the_schedule():
    _, _, model, scheduler, scaler, _ = one_step(precision="fp16", loss_scale=2.0**60)  # the scaled gradients overflow
    before = one_step(precision="fp16", num_steps=1)[2]
    assert scheduler.last_epoch == 0
    assert scaler.get_scale() == 2.0**59
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


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
    score = evaluate(
        checkpoint.model, EvaluationView(open_split("partbirds", "test", 64, 64, preset="easy", seed=42), 64), ALONE, 7
    )
    assert score == results[0].last or score.loss == pytest.approx(results[0].last.loss, rel=1e-5)


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


def test_a_new_run_of_the_same_name_starts_clean(tmp_path):
    train(TrainOptions(**SMALL, output_dir=str(tmp_path)))
    with pytest.raises(FloatingPointError):
        train(
            TrainOptions(
                **{**SMALL, "learning_rate": 1e30, "max_grad_norm": 0.0, "eval_every": 6}, output_dir=str(tmp_path)
            )
        )
    assert [path.name for path in (tmp_path / "ffvt").iterdir()] == ["log.jsonl"]


def test_workers_change_nothing(tmp_path, photographs):
    losses = []
    for workers in (0, 2):
        changes = dict(dataset="imagefolder", data_root=str(photographs), resize_size=80, workers=workers, num_steps=3)
        result = train(TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path), name=f"w{workers}"))
        losses.append([line["loss"] for line in read_log(result.folder) if "loss" in line])
    assert losses[0] == losses[1]


def launch(world_size, arguments, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(world_size),
        "--rdzv_backend",
        "c10d",
    ]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "ffvt.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)


def test_two_processes_train_as_one_does_and_count_every_image_once(tmp_path):
    """gloo, fp32: the losses of 2 ranks with batch 4 are those of 1 rank with batch 8, to 1e-5."""
    options = {**SMALL, "output_dir": tmp_path, "num_steps": 8, "learning_rate": 0.1}
    ran = launch(2, flags({**options, "name": "two", "train_batch_size": 4, "eval_batch_size": 7}), tmp_path)
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


class Counted(torch.nn.Module):
    """Predicts class 1 whatever it sees."""

    def forward(self, images):
        return torch.tensor([0.0, 3.0, 1.0, 0.5, 0.4, 0.3, 0.2]).repeat(len(images), 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_equals_a_hand_count_at_any_number_of_ranks(size, monkeypatch):
    labels = [1, 0, 1, 2, 3, 6, 1, 5, 0, 1, 4]
    data = [(torch.zeros(3, 2, 2, dtype=torch.uint8), label) for label in labels]
    parts = []
    monkeypatch.setattr(World, "sum", lambda self, values: parts.append(values) or values)
    for rank in range(size):
        evaluate(Counted(), data, World(rank, size, torch.device("cpu")), 2)
    count, top1, top5, loss = torch.stack(parts).sum(0).tolist()
    logits = Counted()(labels)
    assert (count, top1, top5) == (11, 4, 8)  # four of class 1; classes 0 and 6 are not among the first five
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    )


def test_an_empty_evaluation_is_refused():
    with pytest.raises(ValueError, match="must have images; got 0"):
        evaluate(Counted(), [], ALONE, 2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    changes = {"learning_rate": 1e30, "max_grad_norm": 0.0, "log_every": 5}
    options = TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path))
    with pytest.raises(FloatingPointError, match="loss must be finite; got loss=nan at step 4"):  # before it is saved
        train(options)
    assert not (tmp_path / "ffvt" / "last").exists()


def test_checkpoints_replace_each_other_whole_and_damage_is_named(tmp_path):
    model, facts = tiny_model(), {"classes": list("abcde"), "resize_size": 64, "options": {}}
    for step in (1, 2):
        save_checkpoint(tmp_path / "last", model, {**facts, "step": step})
    assert load_checkpoint(tmp_path / "last").facts["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "last").rename(tmp_path / "last.old")  # cut off between the two renames of a save
    assert load_checkpoint(tmp_path / "last").facts["step"] == 2
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path / "last", model, {**facts, "loss": float("nan")})
    assert load_checkpoint(tmp_path / "last").facts["step"] == 2
    save_checkpoint(tmp_path / "last", model, {**facts, "classes": ["a"]})
    with pytest.raises(ValueError, match="names 1 classes, its model has 5"):
        load_checkpoint(tmp_path / "last")
    (tmp_path / "last" / "training.json").write_text("[]")
    with pytest.raises(ValueError, match=r"training\.json is damaged"):
        load_checkpoint(tmp_path / "last")
