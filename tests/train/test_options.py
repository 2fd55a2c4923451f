"""Training options: the authors' flags, ours, their bounds, and what derives from them."""

import argparse
import json
from dataclasses import fields

import pytest

from ffvt.cli import make_parser
from ffvt.data import transforms
from ffvt.model.config import make_config
from ffvt.train.flags import add_training_flags, parse_training_flags
from ffvt.train.memory import OPTIMIZER_TENSORS
from ffvt.train.options import AUGMENTATIONS, MODEL_CHOICES, OPTIMIZERS, TrainOptions
from tests.helpers import AUTHORS_COMMANDS, flags


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
        (["--fp16", "--precision", "auto"], "fp16 (or left out) with fp16=True; got precision='auto'"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb"}, "train: optimizer must be one of sgd, adamw; got optimizer='lamb'"),
        ({"device": "tpu"}, "train: device must be one of auto, cpu, cuda; got device='tpu'"),
        ({"layer_decay": 0.0}, r"train: layer_decay must be in \(0, 1\]; got layer_decay=0.0"),
        ({"ema_decay": 1.0}, r"train: ema_decay must be in \[0, 1\); got ema_decay=1.0"),
        ({"learning_rate": 0.0}, "train: learning_rate must be positive; got learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "train: learning_rate must be finite; got learning_rate=nan"),
        ({"workers": -1}, "train: workers must be at least 0; got workers=-1"),
        ({"augment": "all"}, "train: augment must be one of none, flip, crop, .*, auto; got augment='all'"),
        ({"mixup": 1e-9}, "train: mixup must be 0 or at least 0.01; got mixup=1e-09"),
        ({"mean": (0.5, 0.5)}, r"train: mean must be 3 numbers, or empty; got mean=\(0.5, 0.5\)"),
        ({"mean": (0.5,) * 3}, r"train: std must be given with mean; got std=\(\)"),
        ({"class_weights": "sqrt", "balanced_sampling": True}, ".* none with balanced_sampling=True; got .*='sqrt'"),
        (
            {"images_per_class": 2, "balanced_sampling": True},
            ".* 0 with balanced_sampling=True; got images_per_class=2",
        ),
        ({"images_per_class": 3}, ".* a multiple of .*_steps=3; got train_batch_size=8"),
        ({"images_per_class": 4, "gradient_accumulation_steps": 4}, ".* a multiple of .*=16; got train_batch_size=8"),
        ({"images_per_class": -1}, "train: images_per_class must be at least 0; got images_per_class=-1"),
        ({"contrastive": True, "mixup": 0.2}, "train: contrastive must be False with mixup .*; got contrastive=True"),
        ({"contrastive": True, "cutmix": 1.0}, "train: contrastive must be False with mixup .*; got contrastive=True"),
        ({"criterion": "vote"}, "train: criterion must be maws without feature_fusion, .*; got criterion='vote'"),
        ({"criterion": "vote", "head": "transfg", "feature_fusion": True}, "train: criterion must be maws .*"),
        ({"head": "linear"}, "train: head must be one of ffvt, transfg; got head='linear'"),
        ({"keep_rate": 0.0}, r"train: keep_rate must be in \(0, 1\]; got keep_rate=0.0"),
        ({"keep_rate": 0.5, "head": "transfg"}, "train: keep_rate must be 1 with head=transfg; got keep_rate=0.5"),
        ({"locations": ()}, r"train: locations must be integers; got locations=\(\)"),
        ({"locations": (1.5,)}, r"train: locations must be integers; got locations=\(1.5,\)"),
        ({"patch_stride": 0}, "train: patch_stride must be at least 1; got patch_stride=0"),
    ],
)
def test_options_made_in_python_are_held_to_the_same_bounds(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainOptions(**changes)


@pytest.mark.parametrize("changes", [{"layer_decay": 1.0}, {"val_split": 0.0}, {"workers": 0}, {"prefetch": 1}])
def test_the_closed_end_of_a_range_is_accepted(changes):
    ((name, value),) = changes.items()
    assert getattr(TrainOptions(**changes), name) == value


def test_every_option_is_a_flag_with_its_default():
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    parsed = vars(parser.parse_args([]))
    assert parse_training_flags([]) == TrainOptions()
    for option in fields(TrainOptions):
        assert parsed[option.name] == option.default, option.name


def test_options_survive_the_way_through_their_flags():
    options = TrainOptions(depth=3, fp16=True, learning_rate=1e-3, name="a b", cache_dir="cache", ema_decay=0.9)
    assert parse_training_flags(flags(options)) == options
    options = TrainOptions(mean=(0.5, 0, 1), std=[0.5, 0.25, 1.0], augment="rand", mixup=0.2, balanced_sampling=True)
    assert options.std == (0.5, 0.25, 1.0)
    assert TrainOptions(**json.loads(json.dumps(options.to_dict()))) == options
    assert parse_training_flags(flags(options)) == options
    options = TrainOptions(
        feature_fusion=True, criterion="vote:12", patch_stride=12, keep_rate=0.7, locations=(2, 5, 8, 10)
    )
    assert TrainOptions(**json.loads(json.dumps(options.to_dict()))) == options
    assert parse_training_flags(flags(options)) == options


def test_plan_takes_trains_flags_with_trains_defaults():
    parsed = {command: vars(make_parser().parse_args([command])) for command in ("train", "plan")}
    for option in fields(TrainOptions):
        assert parsed["plan"][option.name] == parsed["train"][option.name] == option.default, option.name


def test_the_help_is_grouped_by_topic_and_marks_the_authors_flags():
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    shown = " ".join(parser.format_help().split())
    for topic in ("data", "model", "optimiser", "schedule", "precision and speed", "checkpoints", "evaluation", "run"):
        assert f"{topic}:" in shown
    assert "peak learning rate (authors') (default: 0.03)" in shown
    assert "optimiser: sgd, adamw (default: sgd)" in shown


def test_fields_that_a_model_of_timm_may_lack_are_given_only_where_they_are_not_the_default():
    assert not set(MODEL_CHOICES) & set(TrainOptions().model_fields(10))
    changes = {"criterion": "ats", "keep_rate": 0.7, "locations": (1,), "patch_stride": 12}
    fields_given = TrainOptions(feature_fusion=True, **changes).model_fields(10)
    assert {name: fields_given.get(name) for name in changes} == changes
    config = make_config("vit_s16", **TrainOptions(model_type="vit_s16", head="transfg").model_fields(10))
    assert config.kind == "transfg"


def test_choices_are_those_of_the_code_that_takes_them():
    assert tuple(OPTIMIZER_TENSORS) == OPTIMIZERS
    assert tuple(transforms.AUGMENTATIONS) == AUGMENTATIONS


def test_epochs_become_steps_of_all_processes():
    options = TrainOptions(train_batch_size=8, epochs=3, warmup_epochs=0.5, eval_epochs=1)
    steps = options.in_steps(images=100, world_size=2)
    assert (steps.num_steps, steps.warmup_steps, steps.eval_every) == (19, 3, 6)
    least = TrainOptions(epochs=0.01, warmup_epochs=0, eval_epochs=0.01).in_steps(images=10, world_size=1)
    assert (least.num_steps, least.warmup_steps, least.eval_every) == (1, 0, 1)
    assert TrainOptions(num_steps=7).in_steps(images=10, world_size=3) == TrainOptions(num_steps=7)


def test_steps_given_later_replace_epochs_given_before(tmp_path):
    options = parse_training_flags(["--recipe", "finetune", "--num_steps", "100", "--eval_every", "10"])
    steps = options.in_steps(images=1000, world_size=1)
    assert (steps.num_steps, steps.eval_every, steps.warmup_epochs) == (100, 10, 0.4)
    (tmp_path / "k.yaml").write_text("num_steps: 50\nepochs:\n")
    assert parse_training_flags(["--recipe", "finetune", "--config", str(tmp_path / "k.yaml")]).epochs is None
    assert parse_training_flags(["--num_steps", "7", "--epochs", "2"]).in_steps(8, 1).num_steps == 2
    assert parse_training_flags(["--recipe", "finetune", "--epochs", "3"]).epochs == 3


def test_auto_goes_with_recipes_files_and_sharding(tmp_path):
    assert parse_training_flags(["--recipe", "cub", "--precision", "auto"]).precision == "auto"
    file = tmp_path / "config.yaml"
    file.write_text("precision: auto\nfsdp: true\n")
    assert parse_training_flags(["--recipe", "cub", "--config", str(file)]).precision == "auto"
    assert parse_training_flags(["--config", str(file), "--precision", "bf16"]).precision == "bf16"
