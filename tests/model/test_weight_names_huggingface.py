"""Hugging Face's weights: each family's features are those of its own model, and what FFVT lacks is refused."""

import pytest
import torch

import ffvt
from tests.helpers import tiny_model

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=64, patch_size=16
)
OURS = dict(depth=3, mlp_dim=256, feature_fusion=False)


def theirs(family, head="Model", **changes):
    """A small model of a family with random weights, spread so that every part counts."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "layer_norm_eps": 1e-6, **changes})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model


def ours(**changes):
    return tiny_model(**{**OURS, **changes}).eval()


FAMILIES = {
    "ViT": ({}, {}),
    "DINOv2": (dict(layerscale_value=0.5, mlp_ratio=4), dict(layer_scale=1.0)),
    "MSN": ({}, {}),
    "MAE": (dict(mask_ratio=0.0), {}),
    "without biases": (dict(qkv_bias=False), dict(qkv_bias=False)),
}
NAMES = {"DINOv2": "Dinov2", "MSN": "ViTMSN", "MAE": "ViTMAE", "without biases": "ViT"}


@pytest.mark.parametrize("form", ["modules", "published"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_their_models(family, form, tmp_path):
    changes, mine = FAMILIES[family]
    model, found = theirs(NAMES.get(family, family), **changes), ours(**mine)
    if form == "published":  # files keep the older names, whatever the modules are called
        model.save_pretrained(tmp_path)
    report = ffvt.load_weights(found, tmp_path if form == "published" else model.state_dict())
    assert report.format == "Hugging Face's names"
    assert report.left == ["head.weight", "head.bias"]
    images = torch.randn(2, 3, 64, 64)
    more = {"noise": torch.arange(16.0).expand(2, 16)} if family == "MAE" else {}  # its masking leaves the order
    with torch.no_grad():
        expected = model(images, **more).last_hidden_state[:, 0]
        torch.testing.assert_close(found.forward_features(images), expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_brings_its_head_and_a_prefix():
    for family in ("ViT", "Dinov2"):
        model = theirs(family, "ForImageClassification", num_labels=5)
        found = ours(layer_scale=1.0 if family == "Dinov2" else None, mlp_dim=256)
        report = ffvt.load_weights(found, model.state_dict())
        images = torch.randn(2, 3, 64, 64)
        if family == "ViT":
            torch.testing.assert_close(found(images), model(images).logits, rtol=1e-5, atol=1e-5)
        else:  # its head reads the patches' mean too
            assert "a head of another shape" in report.ignored["classifier.weight"]


def test_an_epsilon_of_1e_12_changes_little():
    model, found = theirs("ViT", layer_norm_eps=1e-12), ours()
    ffvt.load_weights(found, model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 0]
        torch.testing.assert_close(found.forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_and_the_fusion_block_follows_its_option():
    model, fused = theirs("ViT"), tiny_model(depth=3, mlp_dim=256, image_size=96)
    report = ffvt.load_weights(fused, model.state_dict(), last_block="pretrained")
    assert report.resized == ["pos_embed"]
    assert report.left == ["head.weight", "head.bias"]
    assert torch.equal(fused.last_block.mlp.fc1.weight, model.layers[2].mlp.fc1.weight)
    assert torch.equal(fused.last_block.attn.qkv.weight[64:128], model.layers[2].attention.k_proj.weight)


LACKING = {
    "registers": ("Dinov2WithRegisters", dict(mlp_ratio=4), "register tokens.*embeddings.register_tokens"),
    "distillation token": ("DeiT", {}, "distillation token.*embeddings.distillation_token"),
    "CLIP": ("CLIPVision", {}, "must have a place in the model; got '.*add_feature_fusion"),
    "no class token": ("IJepa", {}, "must have a class token"),
    "SigLIP": ("SiglipVision", {}, "must have a place in the model; got '"),
    "BEiT": ("Beit", {}, "must have a place in the model; got 'layers.0.lambda_1'"),
    "rotary positions": ("DINOv3ViT", {}, "must have a place in the model"),
}


@pytest.mark.parametrize(("family", "changes", "told"), LACKING.values(), ids=LACKING)
def test_parts_that_ffvt_lacks_are_refused_by_name(family, changes, told):
    found = ours(layer_scale=1.0 if "lambda" in told or "register" in told else None)
    with pytest.raises(ValueError, match=f"load_weights: .*{told}"):
        ffvt.load_weights(found, theirs(family, **changes).state_dict())


@pytest.mark.parametrize(
    ("changes", "told"),
    [(dict(num_attention_heads=8), "num_heads must be 8, as .*config.json' says; got num_heads=4"),
     (dict(hidden_act="gelu_new"), "hidden_act of .* must be 'gelu', as FFVT's; got 'gelu_new'")],
    ids=["heads", "activation"],
)  # fmt: skip
def test_what_the_weights_do_not_show_is_read_from_the_configuration(changes, told, tmp_path):
    theirs("ViT", **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        ffvt.load_weights(ours(), tmp_path)
