"""save_pretrained and from_pretrained: what is written is what is read, and nothing else is accepted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffvt
from tests.helpers import tiny_model


def test_a_model_survives_saving_and_loading(tmp_path):
    model = tiny_model(first_candidate=1, layer_scale=0.1).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "model")
    again = ffvt.FFVT.from_pretrained(tmp_path / "model")
    images = torch.randn(2, 3, 64, 64)
    assert again.config == model.config
    assert torch.equal(again(images), model(images))
    larger = ffvt.ViT.from_pretrained(tmp_path / "model", image_size=96)
    assert type(larger) is ffvt.FFVT
    assert larger.pos_embed.shape == (1, 37, 64)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is no configuration: Expecting property name"):
        ffvt.FFVT.from_pretrained(tmp_path / "model")


def test_a_saved_plain_vit_is_loaded_as_one(tmp_path):
    model = tiny_model(feature_fusion=False).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    for kind in (ffvt.FFVT, ffvt.ViT):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is ffvt.ViT
        assert torch.equal(again(images), model(images))


def test_a_subclass_loads_as_itself(tmp_path):
    class Mine(ffvt.FFVT):
        pass

    tiny_model().save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine


@pytest.fixture
def saved(tmp_path):
    """A folder with a small model that drops out, its head not zero."""
    model = tiny_model(dropout=0.5)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder, change):
    """Changes the tensors of a saved model: `change` takes and returns the state dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_a_loaded_model_predicts_alike_each_time(saved):
    model = ffvt.FFVT.from_pretrained(saved)
    images = torch.randn(2, 3, 64, 64)
    assert not model.training
    assert torch.equal(model(images), model(images))


WEIGHTS = {
    "head missing": (
        lambda t: {n: v for n, v in t.items() if "head" not in n},
        "lacks head.bias, head.weight|lacks head.weight, head.bias",
    ),
    "head bias missing": (lambda t: {n: v for n, v in t.items() if n != "head.bias"}, "lacks head.bias"),
    "head of other classes": (
        lambda t: {**t, "head.weight": torch.zeros(9, 64)},
        r"head.weight \(9, 64\), not \(5, 64\)",
    ),
    "unknown entry": (lambda t: {**t, "extra": torch.zeros(2)}, "unknown extra"),
    "integers": (lambda t: {n: v.int() for n, v in t.items()}, "no floating point, cls_token in I32"),
    "one bias a bool": (lambda t: {**t, "norm.bias": t["norm.bias"] > 0}, "norm.bias in BOOL"),
    "complex": (lambda t: {**t, "norm.bias": t["norm.bias"].to(torch.complex64)}, "norm.bias in C64"),
    "positions of another size": (lambda t: {**t, "pos_embed": torch.zeros(1, 26, 64)}, r"pos_embed \(1, 26, 64\)"),
}


@pytest.mark.parametrize(("change", "told"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_the_configurations_are_refused(saved, change, told):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=rf"from_pretrained: .*model.safetensors' must hold.*({told})"):
        ffvt.FFVT.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_point_weights_are_cast_and_it_is_said(saved, dtype, caplog):
    before = load_file(saved / "model.safetensors")
    rewrite(saved, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    with caplog.at_level("INFO", "ffvt"):
        model = ffvt.FFVT.from_pretrained(saved)
    assert f"cast from {str(dtype).removeprefix('torch.')}" in caplog.text
    assert torch.equal(model.head.weight, before["head.weight"].to(dtype).float())


def test_another_head_is_made_only_where_it_is_asked_for(saved):
    model = ffvt.FFVT.from_pretrained(saved, num_classes=7)
    assert model.head.weight.shape == (7, 64)
    assert not model.head.weight.any()
    assert torch.equal(model.pos_embed, ffvt.FFVT.from_pretrained(saved).pos_embed)
    with pytest.raises(ValueError, match="must be left out; got blocks.0.ls1.gamma.*with overrides layer_scale"):
        ffvt.FFVT.from_pretrained(saved, layer_scale=0.1)
    with pytest.raises(ValueError, match=r"overrides must be FFVTConfig fields .*got \['width'\]"):
        ffvt.FFVT.from_pretrained(saved, width=3)


CONFIGS = {
    "unknown field": (lambda c: {**c, "width": 3}, "has the unknown width"),
    "fields missing": (lambda c: {n: v for n, v in c.items() if n != "num_heads"}, "lacks num_heads"),
    "a string for a switch": (lambda c: {**c, "feature_fusion": "no"}, "feature_fusion must be True or False"),
    "depth of a file that is none": (lambda c: {**c, "depth": 10**9}, "depth must be a positive integer, at most 256"),
    "fewer blocks": (lambda c: {**c, "depth": 3}, "has the unknown blocks.2"),
    "wider": (lambda c: {**c, "embed_dim": 1 << 20}, r"shapes differ, cls_token \(1, 1, 64\), not \(1, 1, 1048576\)"),
    "of transformers": (
        lambda c: {"model_type": "vit"},
        "must be a configuration of FFVT; got one of 'vit'.*load_weights",
    ),
    "a list": (lambda c: [c], "it holds a list, not an object"),
}


@pytest.mark.parametrize(("change", "told"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_not_the_weights_is_refused(saved, change, told):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(ValueError, match=f"from_pretrained: .*{told}"):
        ffvt.FFVT.from_pretrained(saved)


def test_a_field_that_came_later_may_be_absent(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["backbone"], config["layer_scale"]
    (saved / "config.json").write_text(json.dumps(config))
    assert ffvt.FFVT.from_pretrained(saved).config.backbone is None


def test_a_runs_folder_names_its_checkpoints(tmp_path):
    for name in ("best", "last"):
        tiny_model().save_pretrained(tmp_path / "run" / name)
    with pytest.raises(FileNotFoundError, match=r"from_pretrained: .*best, last in it have: name one of them"):
        ffvt.FFVT.from_pretrained(tmp_path / "run")
    with pytest.raises(
        FileNotFoundError, match=r"from_pretrained: source must be an existing file; got source='.*nothing'"
    ):
        ffvt.FFVT.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be a folder with config.json; got a file"):
        ffvt.FFVT.from_pretrained(tmp_path / "run" / "last" / "model.safetensors")
