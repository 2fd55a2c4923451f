"""add_feature_fusion: timm ViTs with a class token, all their parts kept; what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ffvt
from tests.model.timm_builds import BUILDS, SMALL, Attention, ParallelScalingBlock, VisionTransformer


@pytest.fixture(params=BUILDS, ids=list(BUILDS))
def vit(request):
    return BUILDS[request.param]().eval()


def test_every_build_selects_and_trains(vit):
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


QUICK = ("plain", "rope, registers, swiglu")  # each on one of the two paths through the fusion block


@pytest.mark.parametrize(
    "build", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in BUILDS]
)
def test_every_build_compiles_in_one_graph(build):
    torch.compiler.reset()  # the limit of recompilations is one for all builds
    model = ffvt.add_feature_fusion(BUILDS[build]().eval(), num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 64, 64)
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


def test_with_every_token_picked_once_the_features_are_timms(vit):
    """The fused tokens are then the class token and a permutation of the others, which attention does not see."""
    vit.blocks = vit.blocks[:2]
    tokens = vit.num_prefix_tokens + 16
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = getattr(vit, "fc_norm", nn.Identity())(vit.forward_features(images)[:, 0])
        model = ffvt.add_feature_fusion(vit, num_select=tokens - 1, num_classes=5, first_candidate=1)
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-5)


def test_rotary_positions_follow_the_picked_tokens():
    vit = BUILDS["rope"]().eval()
    model = ffvt.add_feature_fusion(vit, num_select=16, num_classes=5, first_candidate=1)
    _, selection = model.forward_with_selection(torch.randn(1, 3, 64, 64))
    rope = vit.rope.get_embed()
    gathered = model._rope_of_picks(rope, selection.index[:, 0])
    assert torch.equal(gathered[0, 0], rope[selection.index[0, 0] - 1])
    prefix = model._rope_of_picks(rope, torch.tensor([[0, 5]]))[0, 0]
    sine, cosine = prefix[0].chunk(2)
    assert not sine.any()
    assert (cosine == 1).all()


def test_copies_and_pickles_compute_the_same_and_share_nothing(vit):
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), logits)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(model(images), logits)


class ByHandAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


def test_counts_of_numpy_are_integers():
    model = ffvt.add_feature_fusion(BUILDS["plain"](), num_select=np.int64(3), num_classes=np.int32(5))
    assert model.forward_with_selection(torch.randn(1, 3, 64, 64))[1].index.shape == (1, 2, 3)


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
    "one block": (lambda: VisionTransformer(**{**SMALL, "depth": 1}), {}, ValueError, "at least 2 blocks; got depth=1"),
    "too many picks": (BUILDS["plain"], dict(num_select=18), ValueError, "got num_select=18"),
    "first candidate": (BUILDS["plain"], dict(first_candidate=17), ValueError, "got first_candidate=17"),
    "classes": (BUILDS["plain"], dict(num_classes=0), ValueError, "got num_classes=0"),
    "picks a float": (
        BUILDS["plain"],
        dict(num_select=3.0),
        TypeError,
        "num_select must be an integer; got num_select=3.0",
    ),
    "picks a bool": (BUILDS["plain"], dict(num_select=True), TypeError, "got num_select=True"),
    "classes a float": (BUILDS["plain"], dict(num_classes=5.0), TypeError, "got num_classes=5.0"),
    "candidate a bool": (BUILDS["plain"], dict(first_candidate=True), TypeError, "got first_candidate=True"),
    "differential attention": (
        lambda: VisionTransformer(**SMALL, attn_layer="diff"),
        {},
        ValueError,
        "on q, k, v of one shape; got a DiffAttention: .*q and v must have one shape",
    ),
    "attention without a call": (
        lambda: VisionTransformer(**SMALL, attn_layer=ByHandAttention),
        {},
        ValueError,
        "must call scaled_dot_product_attention once; got 0 calls",
    ),
    "parallel blocks": (
        lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock),
        {},
        ValueError,
        "one attention named attn; got a ParallelScalingBlock",
    ),
}


@pytest.mark.parametrize(("build", "options", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_fused_is_named(build, options, error, message):
    vit = build()
    before = repr(vit)
    with pytest.raises(error, match=f"^add_feature_fusion: .*{message}"):
        ffvt.add_feature_fusion(vit, **options)
    assert repr(vit) == before
