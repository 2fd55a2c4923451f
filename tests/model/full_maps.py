"""Every criterion from whole attention maps, as published: what the tests of adapters compare with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])


class Seen(NamedTuple):
    """One block: logits (B, H, N, N), values (B, H, N, D), and the tokens (B, N, C) that it gave out."""

    logits: Tensor
    values: Tensor
    tokens: Tensor

    @property
    def map(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def row(self) -> Tensor:
        return self.map[:, :, 0]


class Watch(TorchFunctionMode):
    """Keeps logits and values of each call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
            self.calls.append(((query @ key.mT * scale).detach(), value.detach()))
        return func(*args, **(kwargs or {}))


def maws(blocks, prefix):
    return blocks[-1].row.mean(1) * blocks[-1].logits[..., 0].softmax(-1).mean(1)


def class_row(blocks, prefix):
    return blocks[-1].row.mean(1)


def column(blocks, prefix):
    return blocks[-1].logits[..., 0].softmax(-1).mean(1)


def vote(blocks, prefix, votes=24):
    row = blocks[-1].row[:, :, prefix:]
    side = math.isqrt(row.shape[2])
    counts = torch.zeros_like(row)
    counts.scatter_(2, row.topk(min(votes, row.shape[2])).indices, 1.0)
    grid = counts.sum(1).view(-1, 1, side, side)
    blurred = F.conv2d(grid, KERNEL.view(1, 1, 3, 3), padding=1).flatten(1)
    return torch.cat([torch.zeros(len(row), prefix), blurred], dim=1)


def ats(blocks, prefix):
    weighted = blocks[-1].row * blocks[-1].values.norm(dim=-1)
    return (weighted / weighted[:, :, prefix:].sum(2, keepdim=True)).mean(1)


def received(blocks, prefix):
    return blocks[-1].map.mean((1, 2))


def rollout(blocks, prefix):
    flow = torch.eye(blocks[0].map.shape[-1])
    for block in blocks:
        flow = (block.map.mean(1) + torch.eye(flow.shape[-1])) / 2 @ flow
    return flow[:, 0]


def psm(blocks, prefix):
    flow = blocks[0].map
    for block in blocks[1:]:
        flow = block.map @ flow
    return flow[:, :, 0].mean(1)


def similarity(blocks, prefix):
    tokens = blocks[-1].tokens
    return (1 + F.cosine_similarity(tokens[:, :1], tokens, dim=-1)) / 2


SCORES = {f.__name__: f for f in (maws, class_row, column, vote, ats, received, rollout, psm, similarity)}
