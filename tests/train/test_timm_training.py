"""--model_type timm:NAME: any timm ViT trained as FFVT or as it is, saved, resumed, evaluated and used."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffvt
from ffvt.cli import main
from ffvt.data.datasets import recipe_of
from ffvt.inference import Classifier, load
from ffvt.model.registry import image_statistics, load_weights, training_flops
from ffvt.scoring import evaluate_checkpoint
from ffvt.train import state
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.data import open_data
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.evaluate import evaluate
from ffvt.train.flags import parse_training_flags
from ffvt.train.optim import make_optimizer
from ffvt.train.options import TrainOptions
from ffvt.train.plan import describe_plan
from ffvt.train.state import build_model
from tests.helpers import SMALL, launch, values

timm = pytest.importorskip("timm")

ALONE = World(0, 1, torch.device("cpu"))
REGISTERS = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
ROTARY = "timm:vit_small_plus_patch16_dinov3"
OWN = SMALL | dict(model_type=REGISTERS, embed_dim=48, num_heads=3, mlp_dim=96, optimizer="adamw", learning_rate=1e-3)


def options(folder, name="run", **changes):
    return TrainOptions(**{**OWN, **changes}, output_dir=str(folder), name=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with registers after six steps, fused."""
    folder = tmp_path_factory.mktemp("runs")
    return train(options(folder, first_candidate=1, ema_decay=0.5, layer_decay=0.75))


def test_a_fused_run_logs_its_picks_and_what_it_computes(trained):
    picks = trained.last.selection
    assert trained.last.count == 300
    assert picks.class_token_rate == 0
    assert len(picks.layer_hit_rates) == 2
    assert 0 < picks.random_hit_rate < 1
    assert all(math.isfinite(value) and value > 0 for value in values(trained.folder, key="mfu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "vote:3", "contrastive": True, "first_candidate": 1},
        {"keep_rate": 0.5, "locations": (0,), "num_token": 2, "first_candidate": 1, "contrastive": True},
        {"feature_fusion": False, "contrastive": True, "images_per_class": 2},
    ],
    ids=["criterion", "reduced", "plain"],
)
def test_its_choices_are_trained_saved_and_taken_up(changes, tmp_path):
    result = train(options(tmp_path, num_steps=2, **changes))
    assert len(values(result.folder, key="contrastive")) == 2
    classifier = load(result.folder, device="cpu")
    asked = {name: value for name, value in changes.items() if name in ("criterion", "keep_rate", "locations")}
    assert {name: getattr(classifier.model.config, name) for name in asked} == asked
    if changes.get("feature_fusion", True):
        classifier.pick_by("random")
        assert classifier.model.config.criterion == "random"
    again = train(options(tmp_path, "again", num_steps=2, resume=str(result.folder / "last"), **changes))
    assert again.last.top1 == result.last.top1


def test_its_checkpoint_gives_the_same_model_and_the_same_score(trained):
    checkpoint = load_checkpoint(trained.folder / "last")
    config = json.loads((trained.folder / "last" / "config.json").read_text())
    assert config["timm"] == REGISTERS.removeprefix("timm:")
    assert config["first_candidate"] == 5
    assert type(checkpoint.model).__name__ == "FeatureFusion"
    score = evaluate_checkpoint(load(trained.folder / "last", batch_size=50), ALONE).score
    assert score.per_class == trained.last.per_class
    assert score.selection == trained.last.selection


def test_hit_rates_count_patches_and_no_register(trained):
    """A model that picks every patch hits as often as chance; with its registers among the picks, it would not."""
    view = open_data(options("unused")).validation
    model = load(trained.folder / "last").model
    model.num_select, model.first_candidate = 16, 5
    picks = evaluate(model, view, ALONE, 50).selection
    assert picks.hit_rate == pytest.approx(picks.random_hit_rate)
    model.num_select, model.first_candidate = 21, 0
    picks = evaluate(model, view, ALONE, 50).selection
    assert picks.hit_rate == pytest.approx(picks.random_hit_rate)
    assert picks.class_token_rate == 1


def test_predict_evaluate_and_visualize_work_on_it(trained, photographs, tmp_path, capsys):
    picture = str(photographs / "train" / "a" / "0.png")
    checkpoint = str(trained.folder / "best")
    assert main(["predict", "--checkpoint", checkpoint, picture]) == 0
    assert capsys.readouterr().out.count("%") == 5
    assert main(["visualize", "--checkpoint", checkpoint, "--output", str(tmp_path / "picks.png"), picture]) == 0
    assert (tmp_path / "picks.png").exists()


@pytest.mark.parametrize("fusion", [True, False])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, fusion):
    changes = dict(model_type=ROTARY, feature_fusion=fusion, dropout=0.1, ema_decay=0.5)
    whole = train(options(tmp_path, "whole", **changes))
    train(options(tmp_path, "parts", **changes, num_steps=6, save_every=3))
    torch.manual_seed(5)
    resumed = train(options(tmp_path, "again", **changes, resume=str(Path(tmp_path, "parts", "step-00000004"))))
    for name in ("model.safetensors", "state.safetensors"):
        found, expected = (load_file(run.folder / "last" / name) for run in (resumed, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_without_feature_fusion_it_is_timms_own_model(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    result = train(options(tmp_path, model_type=f"timm:{name}", feature_fusion=False, dropout=0.1))
    assert result.last.selection is None
    model = load_checkpoint(result.folder / "last").model
    sizes = dict(img_size=64, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=model.config.num_classes)
    own = timm.create_model(name, **sizes, patch_size=16).eval()
    own.load_state_dict({name.removeprefix("vit."): t for name, t in model.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), own(images))


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_clip_224",
        "vit_small_patch16_dinov3",
    ],
)
def test_every_parameter_is_trained(name, fusion):
    """A rank that waits for a gradient that never comes would hang."""
    model = build_model(options("unused", model_type=f"timm:{name}", feature_fusion=fusion), 5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_checkpointing_in_training_changes_nothing(tmp_path):
    runs = [train(options(tmp_path, str(on), gradient_checkpointing=on, num_steps=3)) for on in (False, True)]
    losses = [values(run.folder) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert load_checkpoint(runs[1].folder / "last").model.vit.grad_checkpointing


@pytest.mark.slow
def test_two_ranks_train_it_with_and_without_shards(tmp_path):
    for name, shard in (("ddp", {}), ("fsdp", {"fsdp": True})):
        done = launch(OWN | dict(name=name, output_dir="runs", train_batch_size=4, **shard), tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    alone = train(options(tmp_path / "runs", "alone"))
    for name in ("ddp", "fsdp"):
        assert values(tmp_path / "runs" / name) == pytest.approx(values(alone.folder), rel=1e-4)
        assert load_checkpoint(tmp_path / "runs" / name / "last").model(torch.zeros(1, 3, 64, 64)).shape[0] == 1


@pytest.mark.slow
def test_it_trains_compiled_and_in_bf16(tmp_path):
    compiled = train(options(tmp_path, "compiled", compile=True, precision="bf16", num_steps=3))
    eager = train(options(tmp_path, "eager", precision="bf16", num_steps=3))
    assert values(compiled.folder) == pytest.approx(values(eager.folder), rel=0.02)


# The model that the options make.


def test_a_first_candidate_leaves_out_the_whole_prefix_and_zero_leaves_out_nothing():
    counts = {given: build_model(options("unused", first_candidate=given), 5).first_candidate for given in (0, 1, 3, 7)}
    assert counts == {0: 0, 1: 5, 3: 5, 7: 7}


def test_dropout_stands_where_the_authors_have_it():
    model = build_model(options("unused", dropout=0.3), 5)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates.pop("vit.pos_drop") == 0.3
    assert {rate for name, rate in rates.items() if name.endswith("attn_drop") or name == "vit.head_drop"} == {0.0}
    assert {rate for name, rate in rates.items() if ".mlp.drop" in name or name.endswith("proj_drop")} == {0.3}


def test_the_statistics_are_the_weights_own():
    assert image_statistics("vit_s16") == ()
    clip = "timm:vit_base_patch16_clip_224.openai"
    data = open_data(options("unused", model_type=clip))
    theirs = timm.get_pretrained_cfg("vit_base_patch16_clip_224.openai")
    assert (data.recipe.mean, data.recipe.std) == (theirs.mean, theirs.std)
    assert data.recipe.mean != recipe_of("partbirds").mean
    assert data.validation.recipe == data.recipe


def test_layers_learn_at_their_own_rates():
    model = build_model(options("unused"), 5)
    optimizer = make_optimizer("adamw", model, 1.0, 0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    rates = {name: group["lr"] for name, group in found.items()}
    assert rates["head.weight"] == rates["vit.norm.weight"] == 1.0
    assert [rates[f"vit.blocks.{block}.attn.qkv.weight"] for block in range(3)] == [0.125, 0.25, 0.5]
    assert rates["vit.pos_embed"] == rates["vit.patch_embed.proj.weight"] == rates["vit.reg_token"] == 0.0625
    assert found["vit.pos_embed"]["weight_decay"] == found["vit.norm.weight"]["weight_decay"] == 0
    assert found["head.weight"]["weight_decay"] == 0.1


def test_operations_are_counted_where_there_is_no_formula():
    """A plain ViT of both kinds: the formula of ours, the counter on timm's."""
    sizes = dict(image_size=64, num_classes=10, embed_dim=48, depth=3, num_heads=3, mlp_dim=96)
    ours = ffvt.create_model("vit_b16", **sizes, feature_fusion=False, prune_dead_rows=False)
    theirs = ffvt.create_model("timm:vit_base_patch16_224", **sizes, feature_fusion=False)
    patches = 2 * 16 * (3 * 16**2) * 48  # the gradient of the images, which nobody needs
    assert training_flops(theirs) == training_flops(ours) + patches


@pytest.mark.parametrize("fusion", [True, False])
def test_operations_of_a_model_that_pools_by_attention_are_counted_too(fusion):
    sizes = dict(image_size=64, embed_dim=48, depth=3, num_heads=3, feature_fusion=fusion)
    assert training_flops(ffvt.create_model("timm:vit_pe_core_tiny_patch16_384", **sizes)) > 1e6


def test_a_plan_says_that_it_does_not_know_timms_models():
    with pytest.raises(
        ValueError, match="^plan: model_type must be one of ours: .*not predicted; got model_type='timm:"
    ):
        describe_plan(options("unused"), memory="1GiB", tflops=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_244", "near: .*vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nobody", r"near: .*vit_tiny_patch16_224\.aug"),
        ("timm:resnet50", "one of timm's plain ViTs; got 'resnet50'"),
    ],
)
def test_names_that_timm_does_not_know_are_refused_when_the_data_is_opened(name, message):
    with pytest.raises(ValueError, match=f"^timm: .*{message}"):
        open_data(options("unused", model_type=name))


def test_the_flags_take_a_prefix_and_near_names_of_ours(capsys):
    assert parse_training_flags(["--model_type", "timm:anything"]).model_type == "timm:anything"
    for wrong, hint in (("ViT-B16", "near: ViT-B_16"), ("timm:", "timm:NAME"), ("resnet50", "timm:NAME")):
        with pytest.raises(SystemExit):
            parse_training_flags(["--model_type", wrong])
        assert hint in capsys.readouterr().err


# Weights to start from.


def weights_of(name, **changes):
    """A state dict that timm itself would write, and the model that it is for."""
    sizes = dict(img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=9)
    vit = timm.create_model(name, **{**sizes, **changes})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vit.state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("last_block", ["random", "pretrained"])
def test_timms_weights_start_a_fused_model(tmp_path, suffix, last_block):
    source = weights_of("vit_small_patch14_reg4_dinov2")
    path = tmp_path / f"weights{suffix}"
    save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
    model = build_model(options(tmp_path, pretrained_dir=str(path), last_block=last_block), 9)
    state = model.state_dict()
    for name in ("pos_embed", "reg_token", "blocks.0.attn.qkv.weight", "blocks.1.ls1.gamma"):
        assert torch.equal(state[f"vit.{name}"], source[name])
    assert torch.equal(state["head.weight"], source["head.weight"])
    is_taken = last_block == "pretrained"
    assert torch.equal(state["vit.blocks.2.mlp.fc1.weight"], source["blocks.2.mlp.fc1.weight"]) == is_taken
    assert torch.equal(state["vit.norm.weight"], source["norm.weight"]) == is_taken


def test_a_plain_model_takes_all_of_them(tmp_path):
    source = weights_of("vit_tiny_patch16_224")
    model = build_model(options(tmp_path, model_type="timm:vit_tiny_patch16_224", feature_fusion=False), 9)
    report = load_weights(model, source)
    assert report.left == []
    assert all(torch.equal(model.state_dict()[f"vit.{name}"], value) for name, value in source.items())


def test_positions_and_patches_of_other_sizes_are_resampled_by_timm(tmp_path):
    source = weights_of("vit_tiny_patch16_224", img_size=112, patch_size=8)
    model = build_model(options(tmp_path, model_type="timm:vit_tiny_patch16_224"), 4)
    report = load_weights(model, source, "pretrained")
    assert sorted(report.resized) == ["patch_embed.proj.weight", "pos_embed"]
    assert sorted(report.ignored) == ["head.bias", "head.weight"]
    assert "resized: " in str(report)


def test_what_training_wrote_starts_another_run_with_its_fusion_block(trained, tmp_path):
    source = load_file(trained.folder / "last" / "model.safetensors")
    model = build_model(options(tmp_path, pretrained_dir=str(trained.folder / "last")), 5)
    assert torch.equal(model.state_dict()["vit.blocks.2.attn.qkv.weight"], source["vit.blocks.2.attn.qkv.weight"])
    assert model.state_dict()["head.weight"].shape[0] == 5
    assert not model.state_dict()["head.weight"].any()


@pytest.mark.parametrize("other", ["another width", "another architecture", "nothing of it", "more blocks"])
def test_weights_of_another_model_change_nothing(tmp_path, other):
    sources = {
        "another width": lambda: weights_of("vit_tiny_patch16_224", embed_dim=96),
        "another architecture": lambda: weights_of("vit_small_patch16_dinov3"),
        "nothing of it": lambda: {"a": torch.ones(3)},
        "more blocks": lambda: weights_of("vit_tiny_patch16_224", depth=4),
    }
    model = build_model(options(tmp_path, model_type="timm:vit_tiny_patch16_224"), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="^load_weights: source must hold weights"):
        load_weights(model, sources[other](), "pretrained")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_model_of_ours_is_normalised_as_timms_weights_were(tmp_path, monkeypatch):
    """In training; and afterwards, also where timm is missing."""
    clip = "vit_base_patch16_clip_224.openai"
    theirs = timm.get_pretrained_cfg(clip)
    monkeypatch.setattr(state, "load_weights", lambda *args, **options: "none")  # there is no network
    run = train(TrainOptions(**SMALL | {"num_steps": 2}, output_dir=str(tmp_path), pretrained_dir=f"timm:{clip}"))
    monkeypatch.setitem(sys.modules, "timm", None)
    classifier = load(run.folder)
    assert (classifier.recipe.mean, classifier.recipe.std) == (theirs.mean, theirs.std)
    del classifier.facts["mean"]
    older = Classifier(classifier.model, classifier.facts)
    assert older.recipe.mean == recipe_of("partbirds").mean
