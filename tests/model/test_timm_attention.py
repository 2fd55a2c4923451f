"""The attention of a timm block, made to select: recomputation, threads, masks, attentions of one's own."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import ffvt
from tests.model.timm_builds import BUILDS, SMALL, Attention, VisionTransformer
from tests.model.timm_counts import counted_forwards, gradients


@pytest.fixture(params=BUILDS, ids=list(BUILDS))
def vit(request):
    return BUILDS[request.param]().eval()


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
