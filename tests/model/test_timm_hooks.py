"""What timm's own tools ask of a model: groups of parameters, facts of the data, the head, checkpointing, saving."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ffvt
from tests.model.timm_builds import BUILDS, NARROW, SMALL, VisionTransformer, timm
from tests.model.timm_counts import counted_forwards, gradients

NAME = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
SIZES = dict(image_size=56, num_classes=5, num_select=3, embed_dim=48, depth=3, num_heads=3)


def fused(**changes):
    return ffvt.create_model(NAME, **SIZES, **changes).eval()


def both():
    return {"fused": fused(), "plain": fused(feature_fusion=False)}


@pytest.fixture(params=["fused", "plain"])
def model(request):
    return both()[request.param]


def test_no_weight_decay_names_parameters_of_the_model(model):
    names = {name for name, _ in model.named_parameters()}
    skipped = model.no_weight_decay()
    assert {"vit.pos_embed", "vit.cls_token", "vit.reg_token"} <= skipped
    assert {"vit.pos_embed", "vit.cls_token", "vit.reg_token"} <= names


def scales(model, caplog):
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert "no effect" not in caplog.text
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_timms_layer_decay_gives_the_scales_of_the_plain_vit(caplog):
    """The embeddings, then one scale per block; the norm and the head learn at the full rate."""
    found = scales(fused(), caplog)
    vit = timm.create_model(NAME.removeprefix("timm:"), img_size=56, **NARROW)
    expected = scales(vit, caplog)
    assert {name: value for name, value in found.items() if not name.startswith("head")} == {
        f"vit.{name}": value for name, value in expected.items() if not name.startswith("head")
    }
    assert found["head.weight"] == (1.0, 0.05)
    assert found["vit.blocks.0.attn.qkv.weight"][0] < found["vit.blocks.2.attn.qkv.weight"][0] < 1


def test_every_parameter_is_in_one_group_of_timms(model):
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.75)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len({group["lr_scale"] for group in groups}) >= 4


def test_the_data_config_is_the_models_own(model):
    found = timm.data.resolve_model_data_config(model)
    theirs = timm.get_pretrained_cfg(NAME.removeprefix("timm:"))
    assert found["input_size"] == (3, 56, 56)
    assert (found["mean"], found["std"]) == (theirs.mean, theirs.std)
    assert found["crop_pct"] == theirs.crop_pct
    assert model.default_cfg == model.pretrained_cfg
    assert model.default_cfg["num_classes"] == 5
    assert timm.data.resolve_model_data_config(model, use_test_size=True)["input_size"] == (3, 56, 56)


def test_the_names_in_the_config_are_of_modules_that_are_there():
    model = fused()
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)


def test_a_vit_that_was_made_by_class_has_a_data_config_too():
    model = ffvt.add_feature_fusion(VisionTransformer(**SMALL), num_select=3)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 64)


def test_the_classifier_can_be_reset(model):
    images = torch.randn(2, 3, 56, 56)
    model.reset_classifier(9)
    assert model(images).shape == (2, 9)
    assert model.num_classes == model.config.num_classes == model.get_classifier().out_features == 9
    model.reset_classifier(0)
    assert model(images).shape == (2, 48)
    assert model.config is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, "avg"), "global_pool must be 'token'.*got global_pool='avg'"), ((-1,), "got num_classes=-1")],
)
def test_a_head_that_the_fused_model_cannot_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^reset_classifier: .*{message}"):
        fused().reset_classifier(*arguments)


def test_features_and_head_make_the_logits(model):
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(2, 3, 56, 56)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 48


def test_feature_fusion_without_a_class_in_the_head_gives_its_features():
    model = fused()
    features = model.forward_features(torch.randn(1, 3, 56, 56))
    assert torch.equal(model.forward_head(features, pre_logits=True), features)


def test_the_fused_model_has_the_switch_of_checkpointing():
    model = ffvt.add_feature_fusion(BUILDS["plain"](), num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 64, 64)
    calls = counted_forwards(model)
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, images), expected)
    assert calls == [3, 3, 3]
    model.set_grad_checkpointing(False)
    gradients(model, images)
    assert calls == [4, 4, 4]
    model.set_grad_checkpointing()
    with torch.no_grad():
        model(images)
    assert calls == [5, 5, 5]
    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager"), images), expected)


def test_checkpointing_is_exact_for_the_plain_model_too():
    model, images = fused(feature_fusion=False), torch.randn(2, 3, 56, 56)
    nn.init.normal_(model.get_classifier().weight)
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    calls = counted_forwards(model)
    for found, own in zip(gradients(model, images), expected):
        torch.testing.assert_close(found, own)
    assert calls == [2, 2, 2]


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(2, 3, 56, 56)
    model.save_pretrained(tmp_path)
    loaded = ffvt.load_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert torch.equal(loaded(images), model(images))


def test_a_state_dict_goes_to_another_model_of_the_same_make_and_back(tmp_path):
    model = ffvt.add_feature_fusion(BUILDS["rope, registers, swiglu"]().eval(), num_select=3, num_classes=5)
    nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = ffvt.add_feature_fusion(BUILDS["rope, registers, swiglu"]().eval(), num_select=3, num_classes=5)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(images), model(images))


def test_a_vit_of_somebody_else_is_not_saved_by_name(tmp_path):
    model = ffvt.add_feature_fusion(VisionTransformer(**SMALL), num_select=3)
    with pytest.raises(ValueError, match="^save_pretrained: config must be known: .*got config=None"):
        model.save_pretrained(tmp_path)


def test_a_copy_has_a_head_and_a_config_of_its_own():
    model = fused()
    twin = copy.deepcopy(model)
    twin.reset_classifier(2)
    assert (model.config.num_classes, twin.config.num_classes) == (5, 2)
    assert model(torch.randn(1, 3, 56, 56)).shape == (1, 5)
