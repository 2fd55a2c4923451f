"""The configuration: presets, the authors' names, and what is refused."""

import json

import numpy as np
import pytest
import torch

import ffvt


def test_presets_have_the_published_sizes():
    millions = {"vit_b16": 86.6, "vit_b32": 88.2, "vit_l16": 304.3, "vit_h14": 632.0}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = ffvt.create_model(name, image_size=224, num_classes=1000, num_select=12)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, rel=2e-3), name


def test_the_authors_names_are_accepted():
    for name in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32"):
        with torch.device("meta"):
            assert ffvt.create_model(name, image_size=448).config.patch_size == int(name[-2:])
    with torch.device("meta"):
        assert ffvt.create_model("ViT-H_14", image_size=448).config.num_tokens == 1025


BAD = {
    "name": (dict(name="vit_x"), "got name='vit_x'"),
    "field": (dict(width=3), r"got \['width'\]"),
    "image size": (dict(image_size=100), "image_size must be a multiple of patch_size=16; got image_size=100"),
    "heads": (dict(num_heads=7), "embed_dim must be a multiple of num_heads=7"),
    "too many picks": (dict(image_size=32, num_select=6), "num_select must be in .*got num_select=6"),
    "first candidate": (dict(first_candidate=-1), "got first_candidate=-1"),
    "depth": (dict(depth=1), "depth must be at least 2"),
    "dropout": (dict(dropout=1.0), "got dropout=1.0"),
    "classes": (dict(num_classes=0), "got num_classes=0"),
    "picks not an integer": (dict(num_select=3.0), "num_select must be an integer; got num_select=3.0"),
    "dropout not a number": (dict(dropout="a"), "got dropout='a'"),
    "hybrid patch": (dict(name="r50_vit_b16", patch_size=32), "patch_size must be 16 behind the backbone"),
    "picks a bool": (dict(num_select=True), "num_select must be an integer; got num_select=True"),
    "layer scale a switch": (
        dict(layer_scale=True),
        "layer_scale must be a finite number or None; got layer_scale=True",
    ),
    "layer scale infinite": (dict(layer_scale=float("inf")), "got layer_scale=inf"),
    "switch not a bool": (dict(feature_fusion=1), "feature_fusion must be True or False; got feature_fusion=1"),
    "backbone": (dict(backbone="r101"), "got backbone='r101'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=f"(FFVTConfig|create_model): .*{message}"):
        ffvt.create_model(**{"name": "vit_b16", **change})


def test_counts_of_numpy_are_saved_as_numbers(tmp_path):
    sizes = dict(image_size=32, depth=np.int64(2), embed_dim=32, num_heads=2, mlp_dim=32, num_select=np.uint8(2))
    ffvt.create_model("vit_s16", num_classes=np.array([0, 1, 2]).max() + 1, **sizes).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_classes"], saved["depth"], saved["num_select"]) == (3, 2, 2)
    assert ffvt.FFVT.from_pretrained(tmp_path).config.depth == 2
