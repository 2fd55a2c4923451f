"""Weights of another size: the message names the size and the preset that fits."""

import pytest
import torch

import ffvt
from ffvt.model.config import PRESETS


def source(name):
    """Names and shapes of a preset's weights, without values."""
    with torch.device("meta"):
        state = ffvt.create_model(name, image_size=PRESETS[name]["patch_size"] * 4, num_classes=3, feature_fusion=False)
    return {key: torch.empty(1).expand(value.shape) for key, value in state.state_dict().items()}


def model(name):
    return ffvt.create_model(name, image_size=PRESETS[name]["patch_size"] * 4, num_classes=3, num_select=2)


@pytest.mark.parametrize(
    ("given", "into", "told"),
    [
        ("vit_s14", "vit_s16", r"the source's patch_size=14; got patch_size=16 \(vit_s14 fits the source\)"),
        ("vit_b16", "vit_s16", r"embed_dim=768, mlp_dim=3072; got embed_dim=384, mlp_dim=1536 \(vit_b16 fits"),
        ("vit_l16", "vit_s16", r"embed_dim=1024, depth=24, mlp_dim=4096; .*\(vit_l16 fits"),
        ("vit_b32", "vit_s16", r"patch_size=32, embed_dim=768.*\(vit_b32 fits"),
    ],
)
def test_a_source_of_another_size_names_the_preset_that_fits(given, into, told):
    with pytest.raises(ValueError, match=f"load_weights: the model must have {told}|{told}") as raised:
        ffvt.load_weights(model(into), source(given))
    assert len(str(raised.value)) < 300


def test_layer_scale_without_a_place_names_the_preset_too():
    state = source("vit_s14")
    plain = ffvt.create_model("vit_s14", image_size=56, num_classes=3, num_select=2, layer_scale=None)
    with pytest.raises(ValueError, match=r"layer_scale must be a number.*got layer_scale=None \(vit_s14 fits"):
        ffvt.load_weights(plain, state)


def test_sizes_that_no_preset_has_are_told_alone():
    small = ffvt.create_model("vit_s16", image_size=64, num_classes=3, num_select=2, depth=2, embed_dim=48, mlp_dim=8)
    with pytest.raises(ValueError, match=r"must have the source's depth=3; got depth=2$"):
        ffvt.load_weights(small, {"blocks.2.norm1.weight": torch.ones(48)})
