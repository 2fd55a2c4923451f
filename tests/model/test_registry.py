"""Both kinds of models behind one door: by type, by configuration, by config.json."""

import json

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
