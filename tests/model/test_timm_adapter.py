"""add_feature_fusion: any timm ViT with a class token, all its parts kept."""

import pytest
import torch

import ffvt

timm = pytest.importorskip("timm")
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)
BUILDS = {
    "plain": lambda: VisionTransformer(**SMALL),
    "layer scale, registers": lambda: VisionTransformer(**SMALL, init_values=0.1, reg_tokens=3, no_embed_class=True),
    "q/k norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "average pooled": lambda: VisionTransformer(**SMALL, global_pool="avg"),
    "dynamic size": lambda: VisionTransformer(**SMALL, dynamic_img_size=True),
    "rope": lambda: Eva(**SMALL, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
    "rope, registers, swiglu": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, num_reg_tokens=2, swiglu_mlp=True, qkv_fused=False, use_abs_pos_emb=False
    ),
}


@pytest.fixture(params=BUILDS, ids=list(BUILDS))
def vit(request):
    return BUILDS[request.param]().eval()


def test_every_build_selects_trains_and_compiles(vit):
    images = torch.randn(2, 3, 64, 64)
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    logits, selection = model.forward_with_selection(images)
    tokens = vit.num_prefix_tokens + 16
    assert logits.shape == (2, 5)
    assert selection.index.shape == (2, 2, 3)
    assert selection.score.shape == (2, 2, tokens)
    assert selection.index.max() < tokens
    logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_the_tokens_of_a_block_are_those_timm_computes(vit):
    """Every token picked in every block, in order: the fusion block then sees timm's own tokens, each twice and
    more."""
    images = torch.randn(2, 3, 64, 64)
    expected = {}

    def keep(number):
        return lambda module, inputs, output: expected.__setitem__(number, output)

    with torch.no_grad():
        hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(vit.blocks[:-1])]
        vit.forward_features(images)
        found = dict(expected)
        model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
        model(images)
        for hook in hooks:
            hook.remove()
    for number, output in expected.items():
        torch.testing.assert_close(output, found[number])


def test_a_plain_timm_vit_becomes_our_ffvt_with_its_weights():
    vit = VisionTransformer(**SMALL).eval()
    torch.nn.init.normal_(vit.pos_embed, std=0.5)
    sizes = dict(image_size=64, num_classes=7, num_select=3, embed_dim=64, depth=3, num_heads=4, mlp_dim=256)
    ours = ffvt.create_model("vit_b16", **sizes, first_candidate=1).eval()
    ffvt.load_weights(ours, vit.state_dict(), last_block="pretrained")
    theirs = ffvt.add_feature_fusion(vit, num_select=3, num_classes=7, first_candidate=1)
    theirs.head.load_state_dict(ours.head.state_dict())
    images = torch.randn(3, 3, 64, 64)
    (logits, selection), (expected, expected_selection) = (m.forward_with_selection(images) for m in (theirs, ours))
    torch.testing.assert_close(logits, expected)
    assert torch.equal(selection.index, expected_selection.index)


def test_rotary_positions_follow_the_picked_tokens():
    """With every token picked once and values that ignore order, the fusion block equals timm's last block on its
    row 0."""
    vit = BUILDS["rope"]().eval()
    images = torch.randn(1, 3, 64, 64)
    model = ffvt.add_feature_fusion(vit, num_select=16, num_classes=5, first_candidate=1)
    _, selection = model.forward_with_selection(images)
    rope = vit.rope.get_embed()
    rows = torch.cat([torch.zeros(1, 1, dtype=torch.int64), selection.index[:, 0]], dim=1)
    gathered = model._rope_rows(rope, rows)
    assert torch.equal(gathered[0, 0], rope[selection.index[0, 0] - 1])
    prefix = model._rope_rows(rope, torch.tensor([[0, 0, 5]]))[0, 0]
    sine, cosine = prefix[0].chunk(2)
    assert not sine.any()
    assert (cosine == 1).all()


def test_the_head_follows_the_vit_in_dtype():
    model = ffvt.add_feature_fusion(VisionTransformer(**SMALL).bfloat16(), num_select=3, num_classes=5)
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_pooling_by_attention_leaves_no_idle_parameter():
    model = ffvt.add_feature_fusion(VisionTransformer(**SMALL, global_pool="map"), num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


BAD = {
    "not timm": (lambda: torch.nn.Linear(2, 2), {}, TypeError, "got Linear"),
    "no class token": (
        lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
        {},
        ValueError,
        "cls_token=None",
    ),
    "attention dropout": (lambda: VisionTransformer(**SMALL, attn_drop_rate=0.1), {}, ValueError, "attn_drop=0.1"),
    "patch dropout": (lambda: VisionTransformer(**SMALL, patch_drop_rate=0.1), {}, ValueError, "patch dropout"),
    "one block": (lambda: VisionTransformer(**{**SMALL, "depth": 1}), {}, ValueError, "at least 2 blocks; got 1"),
    "too many picks": (BUILDS["plain"], dict(num_select=18), ValueError, "got num_select=18"),
    "first candidate": (BUILDS["plain"], dict(first_candidate=17), ValueError, "got first_candidate=17"),
    "classes": (BUILDS["plain"], dict(num_classes=0), ValueError, "got num_classes=0"),
}


@pytest.mark.parametrize(("build", "options", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_fused_is_named(build, options, error, message):
    with pytest.raises(error, match=message):
        ffvt.add_feature_fusion(build(), **options)
