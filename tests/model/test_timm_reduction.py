"""Token reduction of a timm ViT, against the same written image by image on whole maps."""

import copy
import math

import pytest
import torch
from torch import nn

import ffvt
from ffvt.kernels.reference import maws_score, select_top
from ffvt.model.timm_record import record_attention
from tests.model.full_maps import Watch
from tests.model.test_timm_builds import last_block, spread
from tests.model.timm_builds import BUILDS, SMALL, Eva, VisionTransformer
from tests.model.timm_counts import gradients

DEEP = {**SMALL, "depth": 5}
ROPE = dict(use_rot_pos_emb=True, num_reg_tokens=2)
VITS = {
    "plain": lambda: VisionTransformer(**DEEP),
    "registers": lambda: VisionTransformer(**DEEP, init_values=0.3, reg_tokens=2),
    "rope, registers": lambda: Eva(**DEEP, **ROPE, use_abs_pos_emb=False),
    "a table per block": lambda: Eva(**DEEP, **ROPE, rope_type="mixed", attn_type="rope", ref_feat_shape=(4, 4)),
}
PICKS, KEEP, PLACES = 3, 0.6, (0, 2)


@torch.no_grad()
def reduced_by_hand(vit, images):
    """The features and the picks (B, L-1, K) of one image after the other; positions as at the start."""
    prefix, found = vit.num_prefix_tokens, []
    for block in vit.blocks:
        block.attn.fused_attn = True
    for image in images.split(1):
        embedded = vit._pos_embed(vit.patch_embed(image))
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        tables = rope if getattr(vit, "rope_mixed", False) else [rope] * len(vit.blocks)
        x = vit.norm_pre(x)
        where, dropped = list(range(x.shape[1])), x.shape[1]  # the number of the token of those dropped
        picked, chosen = [], []

        def unrotated(tokens, dropped=dropped):
            """The token of those dropped as the class token, which is not rotated either."""
            return [token if token < dropped else 0 for token in tokens]

        for number, block in enumerate(vit.blocks[:-1]):
            with Watch() as watch:
                x = block(x) if rope is None else block(x, rope=rows(tables[number], unrotated(where), prefix))
            ((logits, _),) = watch.calls
            index = select_top(maws_score(logits[:, :, 0], logits[..., 0]), PICKS, prefix)[0].tolist()
            picked.append(x[:, index])
            chosen.append([where[i] for i in index])
            if number in PLACES:
                weight = logits[0, :, 0].softmax(-1).mean(0)
                patches = [i for i in range(prefix, len(where)) if where[i] < dropped]
                best = sorted(patches, key=lambda i: -weight[i])[: math.ceil(KEEP * len(patches))]
                kept = [*range(prefix), *sorted(best)]
                rest = [i for i in range(len(where)) if i not in kept]
                x = torch.cat([x[:, kept], (weight[rest, None] * x[0, rest]).sum(0)[None, None]], dim=1)
                where = [*(where[i] for i in kept), dropped]
        fused = torch.cat([x[:, :1], *picked], dim=1)
        if rope is None:
            last = vit.blocks[-1](fused)
        else:
            last = last_block(
                copy.deepcopy(vit), fused, tables[-1], torch.tensor([unrotated(some) for some in chosen]).flatten()
            )
        found.append((getattr(vit, "fc_norm", nn.Identity())(vit.norm(last[:, 0])), torch.tensor([chosen])))
    features, index = zip(*found)
    return torch.cat(features), torch.cat(index), len(where)


def rows(table, where, prefix):
    """The rows of a rotary table ([H,] N-P, E) that belong to the tokens behind the prefix."""
    sine, cosine = torch.zeros_like(table[..., 0, :]).chunk(2, dim=-1)
    still = torch.cat([sine, cosine + 1], dim=-1)
    return torch.stack([table[..., i - prefix, :] if i else still for i in where[prefix:]], dim=-2)


@pytest.mark.parametrize("build", VITS)
def test_it_is_the_reduction_by_hand(build):
    vit = spread(VITS[build]().eval())
    images = torch.randn(3, 3, 64, 64)
    model = ffvt.add_feature_fusion(
        copy.deepcopy(vit), PICKS, 5, vit.num_prefix_tokens, keep_rate=KEEP, locations=PLACES
    )
    lengths = []
    for block in model.vit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    features, selection = model.forward_features_with_selection(images)
    expected, index, left = reduced_by_hand(vit, images)
    prefix = vit.num_prefix_tokens
    assert lengths == [prefix + 16, prefix + 11, prefix + 11, prefix + 7, 1 + 4 * PICKS]  # 0.6 of 16, of 10; and one
    assert lengths[3] == left
    assert torch.equal(selection.index, index)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert selection.score.shape == (3, 4, prefix + 16)
    assert (selection.score[:, 3, prefix:] > 0).sum(1).tolist() == [6] * 3
    model.zero_grad()
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in model.vit.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("build", BUILDS)
def test_a_rate_of_one_is_the_model_without(build):
    vit = BUILDS[build]()
    images = torch.randn(2, 3, 64, 64)
    plain = spread(ffvt.add_feature_fusion(copy.deepcopy(vit), PICKS, 5))
    model = ffvt.add_feature_fusion(vit, PICKS, 5, keep_rate=1.0, locations=(0,))
    model.load_state_dict(plain.state_dict())
    for found, expected in zip(gradients(model, images), gradients(plain, images)):
        assert torch.equal(found, expected)


def test_the_weights_of_the_dropped_carry_no_gradient():
    """The keys and queries learn of the attention alone: with all values zero there is nothing to learn."""
    vit = VisionTransformer(**DEEP)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight[128:] = 0
            block.attn.qkv.bias[128:] = 0
    model = spread_head(ffvt.add_feature_fusion(vit, PICKS, 5, keep_rate=KEEP, locations=PLACES))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for block in vit.blocks:
        assert not block.attn.qkv.weight.grad[:128].any()
    assert vit.blocks[0].mlp.fc1.weight.grad.any()


def spread_head(model):
    torch.nn.init.normal_(model.head.weight)
    return model


def test_recorded_attention_is_of_the_tokens_left():
    model = ffvt.add_feature_fusion(VisionTransformer(**DEEP).eval(), PICKS, 5, keep_rate=KEEP, locations=PLACES)
    with torch.no_grad(), record_attention(model) as record:
        score = model.forward_with_selection(torch.randn(2, 3, 64, 64))[1].score
    assert [row.shape[2] for row in record.row] == [17, 12, 12, 8, 13]
    torch.testing.assert_close(record.score[0], score[:, 0])


def test_images_of_another_size_are_reduced_too():
    vit = VisionTransformer(**DEEP, dynamic_img_size=True).eval()
    model = ffvt.add_feature_fusion(vit, PICKS, 5, keep_rate=KEEP, locations=PLACES)
    index, score = model.forward_with_selection(torch.randn(2, 3, 96, 64))[1]
    assert score.shape == (2, 4, 25)
    assert index.max() <= 25  # 25 is the token of those dropped
