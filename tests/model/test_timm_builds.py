"""Every architecture of timm that can select: our model against timm's own blocks with explicit maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import ffvt
from ffvt.kernels.reference import maws_score, select_top
from tests.model.timm_builds import MADE, NAMED, REFUSED, build, image_size, timm

PICKS = 3


class Logits(TorchFunctionMode):
    """Keeps the explicit maps that attentions without fused operators put through softmax."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.softmax, torch.softmax, F.softmax) and args[0].ndim == 4:
            self.found.append(args[0].detach())
        return func(*args, **(kwargs or {}))


def spread(model):
    """Larger random weights, so that scores differ and each branch counts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3 if "qk" in name or "q_proj" in name or "k_proj" in name else 0.1)
            elif "gamma" in name:
                parameter.uniform_(0.5, 1.0)
    return model


def explicit_forward(vit, head, images, first_candidate):
    """FFVT by timm's blocks, N x N maps and one image after the other in the last block: logits and picks."""
    embedded = vit._pos_embed(vit.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    x = vit.norm_pre(x)
    ropes = list(rope) if rope is not None and getattr(vit, "rope_mixed", False) else [rope] * len(vit.blocks)
    picked, chosen = [], []
    for block, table in zip(vit.blocks[:-1], ropes):
        with Logits() as maps:
            x = block(x) if table is None else block(x, rope=table)
        (logits,) = maps.found
        index = select_top(maws_score(logits[:, :, 0], logits[..., 0]), PICKS, first_candidate)
        chosen.append(index)
        picked.append(torch.stack([tokens[rows] for tokens, rows in zip(x, index)]))
    fused = torch.cat([x[:, :1], *picked], dim=1)
    if rope is None:
        last = vit.blocks[-1](fused)
    else:
        rows = zip(fused, torch.cat(chosen, dim=1))
        last = torch.cat([last_block(vit, tokens[None], ropes[-1], index) for tokens, index in rows])
    features = getattr(vit, "fc_norm", nn.Identity())(vit.norm(last[:, 0]))
    return head(features), torch.stack(chosen, dim=1)


def last_block(vit, tokens, table, index):
    """The last block on one image's fused tokens, whose rotary table is put together row by row."""
    prefix, attention = vit.num_prefix_tokens, vit.blocks[-1].attn
    sine, cosine = table.chunk(2, dim=-1)
    none = torch.cat([torch.zeros_like(sine[..., 0, :]), torch.ones_like(cosine[..., 0, :])], dim=-1)  # no rotation
    rows = [none if i < prefix else table[..., i - prefix, :] for i in index.tolist()]
    attention.num_prefix_tokens = 1
    return vit.blocks[-1](tokens, rope=torch.stack(rows, dim=-2))


def unfused(vit):
    for block in vit.blocks:
        getattr(block, "attn", block).fused_attn = False
    return vit


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("first", ["every token", pytest.param("patches alone", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*NAMED, *MADE])
def test_it_is_what_timms_own_blocks_give_with_explicit_maps(name, first):
    vit = spread(build(name).eval())
    own = unfused(copy.deepcopy(vit))
    first_candidate = 0 if first == "every token" else vit.num_prefix_tokens
    model = ffvt.add_feature_fusion(vit, PICKS, num_classes=5, first_candidate=first_candidate)
    nn.init.normal_(model.head.weight)
    head = copy.deepcopy(model.head)
    images = torch.randn(2, 3, image_size(vit), image_size(vit))

    logits, selection = model.forward_with_selection(images)
    expected, index = explicit_forward(own, head, images, first_candidate)
    assert torch.equal(selection.index, index)
    assert relative(logits, expected) <= 1e-5

    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    assert relative(model.head.weight.grad, head.weight.grad) <= 1e-5
    nothing = 1e-6 * max(gradient.abs().max() for gradient in theirs.values())  # softmax does not see a bias of keys
    for name, parameter in vit.named_parameters():
        both_nothing = max(parameter.grad.abs().max(), theirs[name].abs().max()) <= nothing
        assert both_nothing or relative(parameter.grad, theirs[name]) <= 1e-5, name


def test_there_are_enough_builds_and_they_differ():
    shapes = {name: [tuple(p.shape) for p in build(name).parameters()] for name in NAMED}
    assert len(NAMED) + len(MADE) >= 20
    assert len({str(shape) for shape in shapes.values()}) >= 15


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_select_is_refused_with_its_reason(name, reason):
    with torch.device("meta"):
        vit = timm.create_model(name)
    with pytest.raises((TypeError, ValueError), match=f"^add_feature_fusion: .*{reason}"):
        ffvt.add_feature_fusion(vit)
    with pytest.raises((TypeError, ValueError)):
        ffvt.create_model(f"timm:{name}", image_size=224, num_classes=5)
