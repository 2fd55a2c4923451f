"""add_feature_fusion: timm ViTs with a class token, all their parts kept; checkpointing; what is refused."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import ffvt

timm = pytest.importorskip("timm")
from timm.layers import Attention, AttentionRope  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer  # noqa: E402

SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)


def with_grouped_heads(vit):
    """Attentions with two keys and values for four queries, which timm repeats before the attention."""
    for block in vit.blocks:
        prefix = block.attn.num_prefix_tokens
        block.attn = AttentionRope(64, 4, num_kv_heads=2, qkv_fused=False, num_prefix_tokens=prefix)
    return vit


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
    "mixed rope, registers": lambda: Eva(
        **SMALL, rope_type="mixed", use_rot_pos_emb=True, num_reg_tokens=2, attn_type="rope", ref_feat_shape=(4, 4)
    ),
    "rope in halves, registers": lambda: Eva(
        **SMALL, rope_type="dinov3", use_rot_pos_emb=True, num_reg_tokens=2, attn_type="rope", rope_rotate_half=True
    ),
    "grouped heads": lambda: with_grouped_heads(Eva(**SMALL, use_rot_pos_emb=True, num_reg_tokens=2)),
}


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


def test_timms_own_forwards_work_after_fusion_as_before(vit):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = vit.forward_features(images)
        norm_and_intermediates = vit.forward_intermediates(images)
        model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
        model(images)
        torch.testing.assert_close(vit.forward_features(images), features)
        torch.testing.assert_close(vit.forward_intermediates(images), norm_and_intermediates)


def test_timms_own_forward_takes_masks_and_small_images_after_fusion():
    """Its attentions select for the fused model only."""
    vit = VisionTransformer(**SMALL, dynamic_img_size=True).eval()
    mask = torch.rand(17, 17) < 0.7
    mask.fill_diagonal_(True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        masked, small = vit.forward_features(images, attn_mask=mask), vit.forward_features(images[..., :32, :32])
        ffvt.add_feature_fusion(vit, num_select=12, num_classes=5)
        torch.testing.assert_close(vit.forward_features(images, attn_mask=mask), masked)
        torch.testing.assert_close(vit.forward_features(images[..., :32, :32]), small)


def gradients(model, images):
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def counted_forwards(model):
    """How often each block's attention ran, as a list that the hooks fill."""
    calls = [0] * len(model.vit.blocks)

    def count(number, *_):
        calls[number] += 1

    for number, block in enumerate(model.vit.blocks):
        block.attn.register_forward_pre_hook(partial(count, number))
    return calls


def recompute_lambda(vit):
    for block in vit.blocks:
        block.forward = lambda *args, run=block.forward, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)


def recompute_wrapped(vit):
    for number, block in enumerate(vit.blocks):
        vit.blocks[number] = checkpoint_wrapper(block)


def recompute_by_timm(vit):
    vit.set_grad_checkpointing(True)


@pytest.mark.parametrize("moment", ["before fusion", "after fusion"])
@pytest.mark.parametrize("recompute", [recompute_lambda, recompute_wrapped, recompute_by_timm])
@pytest.mark.parametrize("build", ["plain", "rope, registers, swiglu"])
def test_activation_checkpointing_recomputes_and_changes_nothing(build, recompute, moment):
    vit = BUILDS[build]()
    images = torch.randn(2, 3, 64, 64)
    plain = ffvt.add_feature_fusion(copy.deepcopy(vit), num_select=3, num_classes=5)
    torch.nn.init.normal_(plain.head.weight)
    if moment == "before fusion":
        recompute(vit)
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    if moment == "after fusion":
        recompute(vit)
    model.head.load_state_dict(plain.head.state_dict())
    calls = counted_forwards(model)
    found = gradients(model, images)
    assert calls == [2, 2, 2]
    torch.testing.assert_close(found, gradients(plain, images))


def test_reentrant_checkpointing_changes_nothing_either():
    vit = BUILDS["plain"]()
    images = torch.randn(2, 3, 64, 64)
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    expected = gradients(model, images)
    for block in vit.blocks:
        block.forward = lambda x, run=block.forward: checkpoint(run, x, use_reentrant=True)
    torch.testing.assert_close(gradients(model, images), expected)


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


def test_threads_do_not_meet():
    model = ffvt.add_feature_fusion(BUILDS["rope, registers, swiglu"]().eval(), num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    images = [torch.randn(1, 3, 64, 64) for _ in range(8)]

    @torch.no_grad()
    def run(image):
        return model.forward_with_selection(image)[1].index, model(image), model.vit.forward_features(image)

    expected = [run(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for found, (index, logits, features) in zip(pool.map(run, images * 4), expected * 4):
            assert torch.equal(found[0], index)
            torch.testing.assert_close(found[1:], (logits, features))


def test_a_vit_can_be_fused_again():
    vit = BUILDS["rope, registers, swiglu"]().eval()
    images = torch.randn(2, 3, 64, 64)
    ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    again = ffvt.add_feature_fusion(vit, num_select=4, num_classes=5)
    assert again.forward_with_selection(images)[1].index.shape == (2, 2, 4)
    assert type(vit.blocks[0].attn).__mro__.count(type(vit.blocks[1].attn)) == 1


class CustomAttention(Attention):
    """timm's attention, with a call of scaled_dot_product_attention of the test's own."""

    arguments = ()
    options = MappingProxyType({})

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, *self.arguments, **self.options)
        return self.proj(out.transpose(1, 2).flatten(2))


ACCEPTED = {
    "nothing": ((), {}),
    "by position": ((None, 0.0, False), {}),
    "by name": ((), dict(attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False, scale=0.2)),
}
REFUSED = {
    "a mask": ((), dict(attn_mask=torch.ones(1, dtype=torch.bool))),
    "a mask by position": ((torch.ones(1),), {}),
    "dropout": ((), dict(dropout_p=0.1)),
    "dropout by position": ((None, 0.1), {}),
    "causality": ((), dict(is_causal=True)),
    "causality by position": ((None, 0.0, True), {}),
    "grouped heads": ((), dict(enable_gqa=True)),
}
NAMED = {"a mask": "attn_mask", "dropout": "dropout_p", "causality": "is_causal", "grouped heads": "enable_gqa"}


@pytest.mark.parametrize(("arguments", "options"), ACCEPTED.values(), ids=ACCEPTED)
def test_an_attention_of_ones_own_is_served(monkeypatch, arguments, options):
    monkeypatch.setattr(CustomAttention, "arguments", arguments)
    monkeypatch.setattr(CustomAttention, "options", options)
    vit = VisionTransformer(**SMALL, attn_layer=CustomAttention).eval()
    images = torch.randn(2, 3, 64, 64)
    features = vit.forward_features(images)
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    assert model.forward_with_selection(images)[1].index.shape == (2, 2, 3)
    torch.testing.assert_close(vit.forward_features(images), features)


@pytest.mark.parametrize(("arguments", "options"), REFUSED.values(), ids=REFUSED)
def test_a_masked_or_otherwise_different_attention_is_refused(request, monkeypatch, arguments, options):
    name = NAMED[request.node.callspec.id.removesuffix(" by position")]
    vit = VisionTransformer(**SMALL, attn_layer=CustomAttention)
    fused = ffvt.add_feature_fusion(copy.deepcopy(vit), num_select=3)
    monkeypatch.setattr(CustomAttention, "arguments", arguments)
    monkeypatch.setattr(CustomAttention, "options", options)
    with pytest.raises(ValueError, match=f"got a CustomAttention: .*got {name}"):
        ffvt.add_feature_fusion(vit, num_select=3)
    assert isinstance(vit.head, nn.Linear)
    with pytest.raises(NotImplementedError, match=f"^add_feature_fusion: .*got {name}"):
        fused(torch.randn(1, 3, 64, 64))


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
