"""Both kinds of models behind one door: by type, by configuration, by config.json."""

import copy
import json
import os

import pytest
import torch

import ffvt
from ffvt.model.registry import config_of, model_of
from tests.helpers import tiny_model
from tests.model.timm_builds import timm

TINY = dict(image_size=32, num_classes=3, num_select=2, embed_dim=16, depth=2, num_heads=2)


@pytest.mark.parametrize("fusion", [True, False])
def test_a_model_of_ours_is_loaded_as_it_was_saved(tmp_path, fusion):
    model = tiny_model(feature_fusion=fusion).eval()
    model.save_pretrained(tmp_path)
    loaded = ffvt.load_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert not loaded.training
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_the_type_of_a_model_tells_its_kind():
    ours, theirs = config_of("vit_b16", **TINY, mlp_dim=32), config_of("timm:vit_base_patch16_224", **TINY, mlp_dim=32)
    for config in (ours, theirs):
        assert (config.grid_size, config.num_tokens, config.num_prefix_tokens) == (2, 5, 1)
        logits, selection = model_of(config).forward_with_selection(torch.zeros(2, 3, 32, 32))
        assert (logits.shape, selection.index.shape) == ((2, 3), (2, 1, 2))


def test_config_json_tells_that_it_is_timms_and_loading_asks_no_network(tmp_path, monkeypatch):
    ffvt.create_model("timm:deit3_small_patch16_224.fb_in22k_ft_in1k", **TINY).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["timm"] == "deit3_small_patch16_224.fb_in22k_ft_in1k"

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    model = ffvt.load_pretrained(tmp_path)
    assert not model.training
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"got one of timm \(ffvt.load_pretrained\)"):
        ffvt.FFVT.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_in_a_model_of_timm_too(tmp_path, file, make):
    ffvt.create_model("timm:vit_tiny_patch16_224", **TINY).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    make(tmp_path / file)
    with pytest.raises(ValueError, match=f"^load_pretrained: source must be a regular file; got .*{file}"):
        ffvt.load_pretrained(tmp_path)


def test_weights_go_into_either_kind(tmp_path):
    for name in ("vit_b16", "timm:vit_tiny_patch16_224"):
        given, model = (ffvt.create_model(name, **TINY, mlp_dim=32) for _ in range(2))
        given.save_pretrained(tmp_path)
        assert ffvt.load_weights(torch.compile(model), tmp_path).left == []
        assert all(torch.equal(t, given.state_dict()[key]) for key, t in model.state_dict().items())
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    fused = ffvt.add_feature_fusion(copy.deepcopy(vit), num_select=2)
    ffvt.load_weights(fused, vit.state_dict())
    assert torch.equal(fused.vit.pos_embed, vit.pos_embed)
    with pytest.raises(TypeError, match="load_weights: model must be .*; got Linear"):
        ffvt.load_weights(torch.nn.Linear(2, 2), {})


@pytest.mark.parametrize("last_block", ["random", "pretrained"])
def test_a_saved_plain_model_of_timm_gives_its_last_block_only_where_asked(tmp_path, last_block):
    name = "timm:vit_tiny_patch16_224"
    plain, fused = (ffvt.create_model(name, **TINY, feature_fusion=fusion) for fusion in (False, True))
    torch.nn.init.ones_(plain.vit.blocks[-1].norm1.bias)
    plain.save_pretrained(tmp_path)
    ffvt.load_weights(fused, tmp_path, last_block)
    assert bool(fused.vit.blocks[-1].norm1.bias.all()) == (last_block == "pretrained")


def test_what_a_foreign_configuration_leaves_open_is_not_compared(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": None, "hidden_act": None}))
    assert ffvt.load_weights(tiny_model(), tmp_path).left == []
