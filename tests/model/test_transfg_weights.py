"""Weights of a TransFG: every layout that fills one, what it fills elsewhere, saving and loading."""

import dataclasses

import pytest
import torch

import ffvt
from tests.helpers import GOLDEN, golden, relative_error, tiny_model
from tests.model.test_transfg import load_golden, tiny_transfg, with_head


@pytest.mark.parametrize("last_block", ["random", "pretrained"])
def test_a_google_npz_fills_blocks_and_norm_and_the_part_layer_only_where_asked(last_block):
    model, plain = tiny_transfg(num_classes=7), tiny_model(num_classes=7, feature_fusion=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    report = ffvt.load_weights(model, GOLDEN / "google_tiny_weights.npz", last_block=last_block)
    ffvt.load_weights(plain, GOLDEN / "google_tiny_weights.npz")
    left = [name for name in before if name.startswith("last_block.")] if last_block == "random" else []
    assert report.left == left
    assert report.resized == ["pos_embed"]
    for (name, found), expected in zip(model.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(found, before[name] if name in left else expected), name
    if left:
        assert "last_block='random' leaves the part layer" in report.ignored.values()


def test_positions_are_interpolated_for_overlapping_patches():
    model = tiny_transfg(num_classes=7, patch_stride=12)
    assert ffvt.load_weights(model, golden("transfg_tiny", "w/")).resized == ["pos_embed"]
    given = torch.from_numpy(golden("transfg_tiny", "w/")["transformer.embeddings.position_embeddings"])
    assert model.pos_embed.shape == (1, 26, 64)
    corners = [0, 1, 5, 21, 25]  # the class token, and the corners of a grid of 5 x 5; of 4 x 4:
    torch.testing.assert_close(model.pos_embed.data[:, corners], given[:, [0, 1, 4, 13, 16]])


def test_a_checkpoint_of_the_authors_training_is_unwrapped(tmp_path):
    tensors = {name: torch.from_numpy(array) for name, array in golden("transfg_tiny", "w/").items()}
    torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "best.bin")
    model = tiny_transfg()
    assert not ffvt.load_weights(model, tmp_path / "best.bin").left
    arrays = golden("transfg_tiny")
    assert relative_error(model(torch.from_numpy(arrays["x"])), arrays["logits"]) < 1e-5


def test_the_authors_head_stays_out_where_it_does_not_fit():
    model = tiny_transfg(num_classes=9)
    report = ffvt.load_weights(model, golden("transfg_tiny", "w/"))
    assert report.left == ["head.weight", "head.bias"]
    assert set(report.ignored) == {"part_head.weight", "part_head.bias"}


@pytest.mark.parametrize("source", ["ours", "authors"])
def test_the_fusion_block_of_an_ffvt_starts_the_part_layer(source):
    model = tiny_transfg()
    other = tiny_model()
    given = other.state_dict() if source == "ours" else golden("tiny_fusion", "w/")
    report = ffvt.load_weights(model, given)
    assert not report.left
    ffvt.load_weights(other, given)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_transfg_starts_an_ffvt_and_a_plain_vit():
    model, _ = load_golden("transfg_tiny")
    for other in (tiny_model(), tiny_model(feature_fusion=False)):
        assert not ffvt.load_weights(other, golden("transfg_tiny", "w/")).left
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_timm_vit_starts_it():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2, num_classes=5
    )
    model = tiny_transfg(patch_stride=12)
    report = ffvt.load_weights(model, vit.state_dict())
    assert report.format == "timm's names"
    assert report.resized == ["pos_embed"]
    assert {name.partition(".")[0] for name in report.left} == {"last_block"}
    report = ffvt.load_weights(model, vit.state_dict(), last_block="pretrained")
    assert not report.left
    assert torch.equal(model.last_block.attn.qkv.weight, vit.blocks[3].attn.qkv.weight)


def test_saving_and_loading_keeps_kind_and_numbers(tmp_path):
    model = with_head(patch_stride=12).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    for again in (
        ffvt.TransFG.from_pretrained(tmp_path),
        ffvt.FFVT.from_pretrained(tmp_path),
        ffvt.load_pretrained(tmp_path),
    ):
        assert type(again) is ffvt.TransFG
        assert again.config == model.config
        assert torch.equal(again(images), model(images))
    wider = ffvt.load_pretrained(tmp_path).config
    assert dataclasses.replace(wider, patch_stride=None).num_tokens == 17
    larger = ffvt.TransFG.from_pretrained(tmp_path, image_size=76, num_classes=3)
    assert larger(torch.randn(1, 3, 76, 76)).shape == (1, 3)
    ffvt.load_weights(model, tmp_path)


def test_a_source_of_another_depth_is_named():
    with pytest.raises(ValueError, match="must have the source's depth=4; got depth=3"):
        ffvt.load_weights(tiny_transfg(depth=3), golden("transfg_tiny", "w/"))
