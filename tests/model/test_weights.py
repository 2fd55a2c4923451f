"""load_weights: every known layout, what it reports, and that a bad source changes nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ffvt
from ffvt.model.weights import resize_positions
from tests.helpers import GOLDEN, golden, relative_error, tiny_model

PLAIN = {
    "cls_token": torch.zeros(1, 1, 64),
    "pos_embed": torch.zeros(1, 17, 64),
    "patch_embed.proj.weight": torch.zeros(64, 3, 16, 16),
}


def authors_view(model):
    """Our parameters under the authors' names, as `load_weights` reads them, by loading both ways."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["fusion", "plain"])
@pytest.mark.parametrize("source", ["path", "mapping"])
def test_a_google_npz_becomes_what_the_authors_loader_makes_of_it(kind, source):
    found, expected = (tiny_model(num_classes=7, feature_fusion=kind == "fusion") for _ in range(2))
    expected.load_state_dict(found.state_dict())
    given = GOLDEN / "google_tiny_weights.npz" if source == "path" else golden("google_tiny_weights")
    report = ffvt.load_weights(found, given)
    reference = ffvt.load_weights(expected, golden("google_tiny_expected", f"{kind}/"))
    assert report.format == "Google .npz"
    assert report.resized == ["pos_embed"]
    assert report.loaded == reference.loaded
    assert report.left == reference.left
    assert set(report.ignored) >= {"pre_logits/kernel", "pre_logits/bias"}
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def test_the_last_block_and_the_final_norm_follow_the_option():
    random, pretrained = tiny_model(num_classes=7), tiny_model(num_classes=7)
    before = authors_view(random)
    report = ffvt.load_weights(random, GOLDEN / "google_tiny_weights.npz", last_block="random")
    last = [name for name in before if name.startswith(("last_block.", "norm."))]
    assert report.left == last
    assert all(torch.equal(before[name], parameter) for name, parameter in random.named_parameters() if name in last)
    report = ffvt.load_weights(pretrained, GOLDEN / "google_tiny_weights.npz", last_block="pretrained")
    assert not report.left
    plain = tiny_model(num_classes=7, feature_fusion=False)
    ffvt.load_weights(plain, GOLDEN / "google_tiny_weights.npz")
    for (name, a), b in zip(pretrained.named_parameters(), plain.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("suffix", ["bin", "pt", "npz", "safetensors", "nested"])
def test_the_authors_state_dict_loads_from_every_container(tmp_path, suffix):
    state = golden("tiny_fusion", "w/")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "npz":
        np.savez(path, **state)
    elif suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in tensors.items()}} if suffix == "nested" else tensors, path
        )
    model = tiny_model()
    report = ffvt.load_weights(model, path)
    assert report.format == "authors' state dict"
    assert not report.left
    arrays = golden("tiny_fusion")
    assert relative_error(model(torch.from_numpy(arrays["x"])), arrays["logits"]) < 1e-5


def test_our_own_safetensors_load(tmp_path):
    model, again = tiny_model(), tiny_model()
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors", dict(model.state_dict())):
        report = ffvt.load_weights(again, source)
        assert report.format == "ffvt"
        assert not report.left
        assert not report.ignored
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_timm_state_dict_gives_the_plain_vit_the_same_features():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2, init_values=1e-2, num_classes=6
    ).eval()
    torch.nn.init.normal_(vit.pos_embed)
    sizes = dict(image_size=56, patch_size=14, depth=3, layer_scale=1e-5, num_classes=6)
    model = tiny_model(**sizes, feature_fusion=False).eval()
    report = ffvt.load_weights(model, vit.state_dict())
    assert report.format == "timm's names"
    assert not report.left
    assert not report.ignored
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(images), vit(images), rtol=1e-5, atol=1e-5)
    half = {name: value.half() for name, value in vit.state_dict().items()}
    report = ffvt.load_weights(model, half)
    assert report.cast == ["float16"]
    assert str(report).endswith("; cast from float16")
    assert model.pos_embed.dtype == torch.float32
    with pytest.raises(ValueError, match=r"ls1.gamma.*no such parameter"):
        ffvt.load_weights(tiny_model(**{**sizes, "layer_scale": None}), vit.state_dict())


def test_a_timm_build_we_cannot_compute_is_refused():
    with pytest.raises(ValueError, match=r"got 'blocks.0.attn.q_norm.weight'.*add_feature_fusion"):
        ffvt.load_weights(
            tiny_model(), {"cls_token": torch.zeros(1, 1, 64), "blocks.0.attn.q_norm.weight": torch.ones(16)}
        )
    registers = {**PLAIN, "reg_token": torch.zeros(1, 4, 64)}
    with pytest.raises(ValueError, match=r"register tokens must have a place in the model; got 'reg_token'"):
        ffvt.load_weights(tiny_model(), registers)
    with pytest.raises(ValueError, match="distillation token must have a place"):
        ffvt.load_weights(tiny_model(), {**PLAIN, "dist_token": torch.zeros(1, 1, 64)})
    without = {name: value for name, value in PLAIN.items() if name != "cls_token"}
    with pytest.raises(ValueError, match="must have a class token"):
        ffvt.load_weights(tiny_model(), without)


def test_partial_mappings_leave_the_rest():
    model = tiny_model()
    before = authors_view(model)
    query = torch.randn(64, 64)
    report = ffvt.load_weights(model, {"transformer.encoder.layer.1.attn.query.weight": query})
    after = dict(model.named_parameters())
    assert torch.equal(after["blocks.1.attn.qkv.weight"][:64], query)
    assert torch.equal(after["blocks.1.attn.qkv.weight"][64:], before["blocks.1.attn.qkv.weight"][64:])
    assert report.loaded == []
    assert "blocks.1.attn.qkv.weight" in report.left
    assert all(torch.equal(after[name], before[name]) for name in before if name != "blocks.1.attn.qkv.weight")


def test_the_head_is_loaded_only_where_it_fits():
    model = tiny_model(num_classes=9)
    report = ffvt.load_weights(model, golden("tiny_fusion", "w/"))
    assert report.left == ["head.weight", "head.bias"]
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert not model.head.weight.any()
    fits = tiny_model()
    ffvt.load_weights(fits, golden("tiny_fusion", "w/"))
    assert torch.equal(fits.head.weight, torch.from_numpy(golden("tiny_fusion", "w/")["head.weight"]))


def test_the_hybrid_loads_googles_names_and_the_authors():
    sizes = dict(image_size=64, num_classes=3, num_select=2, depth=2, embed_dim=64, num_heads=4, mlp_dim=64)
    model = ffvt.create_model("r50_vit_b16", **sizes)
    google, authors = {}, {}
    for name, parameter in model.patch_embed.backbone.named_parameters():
        value = torch.randn_like(parameter)
        kernel = "kernel" if value.ndim == 4 else "scale" if name.endswith("weight") else "bias"
        stored = value.permute(2, 3, 1, 0) if value.ndim == 4 else value
        if name.startswith("stem."):
            part = name.split(".")[1]
            google[f"{part.replace('norm', 'gn')}_root/{kernel}"] = stored
            authors[f"transformer.embeddings.hybrid_model.root.{part.replace('norm', 'gn')}.{name.split('.')[-1]}"] = (
                value
            )
            continue
        _, stage, _, block, *rest = name.split(".")
        leaf = (
            rest[0].replace("norm", "gn")
            if rest[0] != "downsample"
            else {"conv": "conv_proj", "norm": "gn_proj"}[rest[1]]
        )
        google[f"block{int(stage) + 1}/unit{int(block) + 1}/{leaf}/{kernel}"] = stored
        leaf = "downsample" if leaf == "conv_proj" else leaf
        unit = f"transformer.embeddings.hybrid_model.body.block{int(stage) + 1}.unit{int(block) + 1}"
        authors[f"{unit}.{leaf}.{rest[-1]}"] = value
    for source in (google, authors):
        fresh = ffvt.create_model("r50_vit_b16", **sizes)
        report = ffvt.load_weights(fresh, source)
        names = [f"patch_embed.backbone.{name}" for name, _ in model.patch_embed.backbone.named_parameters()]
        assert report.loaded == names
    expected = google["conv_root/kernel"].permute(3, 2, 0, 1)
    assert torch.equal(fresh.patch_embed.backbone.stem.conv.weight, expected)


def test_positions_are_resized_as_ndimage_zoom_does():
    zoom = pytest.importorskip("scipy.ndimage").zoom
    for old, new in ((3, 4), (14, 28), (24, 7), (37, 8)):
        grid = np.random.default_rng(old).standard_normal((old, old, 5)).astype(np.float32)
        positions = torch.cat([torch.ones(1, 1, 5), torch.from_numpy(grid).reshape(1, -1, 5)], dim=1)
        found = resize_positions(positions, 1 + new * new)
        expected = zoom(grid, (new / old, new / old, 1), order=1)
        np.testing.assert_allclose(found[0, 1:].reshape(new, new, 5).numpy(), expected, atol=1e-5)
        assert torch.equal(found[:, :1], positions[:, :1])
    without_class = resize_positions(torch.ones(1, 16, 5), 17)
    assert not without_class[:, 0].any()
    with pytest.raises(ValueError, match="must be square; got 7 positions"):
        resize_positions(torch.zeros(1, 7, 5), 17)


def test_norms_of_the_fusion_and_of_the_encoder_are_told_apart():
    model = tiny_model()
    ours, theirs = torch.full((64,), 7.0), torch.full((64,), 3.0)
    prefix = "transformer.encoder"
    report = ffvt.load_weights(
        model, {f"{prefix}.ff_encoder_norm.weight": ours, f"{prefix}.encoder_norm.weight": theirs}
    )
    assert torch.equal(model.norm.weight, ours)
    assert "norm.weight" in report.loaded
    assert list(report.ignored) == [f"{prefix}.encoder_norm.weight"]


def test_a_plain_vit_of_ours_follows_the_last_block_option():
    plain = tiny_model(feature_fusion=False)
    assert any(
        "last_block.attn.qkv.weight" in name for name in ffvt.load_weights(tiny_model(), plain.state_dict()).left
    )
    assert not ffvt.load_weights(tiny_model(), plain.state_dict(), last_block="pretrained").left
    fused = tiny_model()
    assert not ffvt.load_weights(plain, fused.state_dict()).left
    assert torch.equal(plain.blocks[3].mlp.fc1.weight, fused.last_block.mlp.fc1.weight)


def test_what_surrounds_a_state_dict_does_no_harm():
    state = golden("tiny_fusion", "w/")
    extra = {**state, "step": 3, "epoch": np.float32(2), "counter": torch.tensor(1)}
    report = ffvt.load_weights(tiny_model(), extra)
    assert not report.left
    assert set(report.ignored) == {"step", "epoch", "counter"}
    nested = {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}, "optimizer": {}}
    assert not ffvt.load_weights(torch.compile(tiny_model()), nested).left
    big_endian = {name: value.astype(">f4") for name, value in state.items()}
    assert not ffvt.load_weights(tiny_model(), big_endian).left
    with pytest.raises(TypeError, match="model must be one of ffvt.create_model, .*; got Linear"):
        ffvt.load_weights(torch.nn.Linear(2, 2), state)


ODD_TENSORS = {
    "sparse": {"cls_token": torch.ones(1, 1, 64), "head.bias": torch.zeros(5).to_sparse()},
    "meta": {"cls_token": torch.ones(1, 1, 64), "head.bias": torch.zeros(5, device="meta")},
    "rank of a kernel": {"Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": torch.zeros(3)},
    "rank of a query": {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": torch.zeros(())},
    "no positions": {"pos_embed": torch.zeros(1, 0, 64)},
}


@pytest.mark.parametrize("source", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_odd_tensors_give_one_error_and_change_nothing(source):
    model = tiny_model()
    with pytest.raises(ValueError, match="load_weights: "):
        ffvt.load_weights(model, source)
    assert not model.cls_token.any()


def test_missing_files_and_unknown_options_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        ffvt.load_weights(tiny_model(), tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="got last_block='copy'"):
        ffvt.load_weights(tiny_model(), {}, last_block="copy")
    with pytest.raises(ValueError, match="got entries nothing"):
        ffvt.load_weights(tiny_model(), {})
    with pytest.raises(ValueError, match="got 'head.bias': list"):
        ffvt.load_weights(tiny_model(), {"head.bias": [0.0] * 5})


def test_the_report_reads_as_a_sentence():
    report = ffvt.load_weights(tiny_model(num_classes=7), GOLDEN / "google_tiny_weights.npz")
    text = str(report)
    assert text.startswith(
        "Google .npz: loaded 42 parameters; resized: pos_embed; left as they were: last_block.norm1.weight"
    )
    assert "pre_logits/kernel (not part of this model)" in text
