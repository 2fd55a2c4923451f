"""Criteria: what makes a token worth picking, as published, from statistics that fused attention leaves behind.

A criterion is called with the `Layer`s so far, first to last, and scores every token of the last one; `pick` takes the
best. No map is made: what needs more of it than the class token's row and column goes by `attention_vecmat`.

    out, stats = ffvt.attention_stats(q, k, v)
    layer = ffvt.criteria.Layer(q, k, v, stats, tokens=x)
    index = ffvt.criteria.pick(ffvt.criteria.vote([layer]), num_select=12, first_candidate=1)

Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ffvt.errors import printable, require
from ffvt.kernels.checks import as_int
from ffvt.kernels.decompositions import select_top
from ffvt.picking import Criterion as Criterion
from ffvt.picking import Layer as Layer
from ffvt.picking import pick as pick

PRIME = 2**31 - 1


class MAWS(Criterion):
    """Mutual attention weight: the product of the class token's row and column, each the mean of the heads.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """

    kind, reason = "maws", "mutual attention weight"
    is_fused = True

    def score(self, layers: Sequence[Layer]) -> Tensor:
        stats = layers[-1].stats
        return stats.row.mean(1) * stats.column.mean(1)


class ClassRow(Criterion):
    """How much the class token attends to each token, the mean of the heads.

    Source: EViT (arXiv 2202.07800), section 3.2; single attention weight selection of FFVT's ablation (section 4.3);
    FasterVLM (arXiv 2412.01818).
    """

    kind, reason = "class_row", "the class token's attention"

    def score(self, layers: Sequence[Layer]) -> Tensor:
        return layers[-1].stats.row.mean(1)


class Column(Criterion):
    """How much each token attends to the class token, as a share of all tokens', the mean of the heads.

    Source: the contribution of FFVT (arXiv 2107.02341), section 3.2, alone.
    """

    kind, reason = "column", "attention to the class token"

    def score(self, layers: Sequence[Layer]) -> Tensor:
        return layers[-1].stats.column.mean(1)


@dataclass(frozen=True)
class Vote(Criterion):
    """Each head votes for the patches that its class token attends to most; a 3 x 3 kernel spreads the votes.

    Attributes:
        votes: of each head; no more than there are patches.

    Raises:
        ValueError: when called, the patches are no square and the Layer has no grid, or another one.

    Source: IELT (IEEE TMM 2023), multi-head voting.
    """

    kind: ClassVar[str] = "vote"
    reason: ClassVar[str] = "votes of the heads"
    needs_every_token: ClassVar[bool] = True  # the grid
    votes: int = 24

    def __post_init__(self) -> None:
        require(as_int("vote", "votes", self.votes) >= 1, "vote", "votes", "at least 1", self.votes)

    def score(self, layers: Sequence[Layer]) -> Tensor:
        row, prefix = layers[-1].stats.row, layers[-1].num_prefix_tokens
        batch, heads, tokens = row.shape
        patches = tokens - prefix
        grid = layers[-1].grid or (math.isqrt(patches),) * 2
        require(grid[0] * grid[1] == patches, "vote", "patches", f"a grid of {grid[0]} x {grid[1]}", patches)
        best = select_top(row[:, :, prefix:].flatten(0, 1), min(self.votes, patches), 0)
        votes = torch.zeros_like(row[:, :, prefix:]).scatter(2, best.unflatten(0, (batch, heads)), 1.0).sum(1)
        return F.pad(_blur(votes.unflatten(1, grid)).flatten(1), (prefix, 0))


def _blur(counts: Tensor) -> Tensor:
    """counts (B, R, C) with the kernel 1 2 1, 2 4 2, 1 2 1: exact, for it only adds."""
    across = F.pad(counts, (1, 1))
    across = across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]
    down = F.pad(across, (0, 0, 1, 1))
    return down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]


class ATS(Criterion):
    """The class token's row times the norm of each value, as a share of the patches', the mean of the heads.

    Source: adaptive token sampling (arXiv 2111.15667), section 3.1.
    """

    kind, reason = "ats", "the class token's attention and the norm of the values"

    def score(self, layers: Sequence[Layer]) -> Tensor:
        layer = layers[-1]
        require(layer.v is not None, "ats", "v", "given in the Layer", layer.v)
        weighted = layer.stats.row * layer.v.float().norm(dim=-1).transpose(1, 2)  # (B, H, N)
        total = weighted[:, :, layer.num_prefix_tokens :].sum(-1, keepdim=True)
        return (weighted / total.clamp(min=torch.finfo(torch.float32).tiny)).mean(1)


class Received(Criterion):
    """How much attention each token receives: the mean over queries and heads.

    Source: the importance of keys in H2O (arXiv 2306.14048); of patches, VisionZip (arXiv 2412.04467) where there is no
    class token.
    """

    kind, reason = "received", "the attention that they receive"

    def score(self, layers: Sequence[Layer]) -> Tensor:
        row = layers[-1].stats.row
        return layers[-1].times(torch.full_like(row, 1 / row.shape[-1])).mean(1)

    def vecmats(self, number: int) -> int:
        return 1


class Rollout(Criterion):
    """The class token's row of the product of all maps so far, each the mean of its heads and half an identity.

    The class token itself scores best nearly always: leave it out of the candidates.

    Source: Abnar and Zuidema (arXiv 2005.00928), attention rollout.
    """

    kind, reason = "rollout", "attention rollout"
    needs_history = needs_every_token = True

    def score(self, layers: Sequence[Layer]) -> Tensor:
        *earlier, last = layers
        flow = _half_identity(last.stats.row.mean(1))
        for layer in reversed(earlier):
            heads = layer.stats.row.shape[1]
            flow = (flow + layer.times(flow.unsqueeze(1).expand(-1, heads, -1)).mean(1)) / 2
        return flow

    def vecmats(self, number: int) -> int:
        return number


def _half_identity(row: Tensor) -> Tensor:
    """Half the class token's row (B, N), half the class token itself."""
    half = row / 2
    half[:, 0] += 0.5
    return half


class PSM(Criterion):
    """The class token's row of the product of all maps so far, head by head; the score is the mean of the heads.

    Source: the part selection module of TransFG (arXiv 2103.07976), section 3.3, which takes the best of each head.
    """

    kind, reason = "psm", "the product of the attention of all layers so far"
    needs_history = needs_every_token = True

    def score(self, layers: Sequence[Layer]) -> Tensor:
        return self.per_head(layers).mean(1)

    @torch.no_grad()
    def per_head(self, layers: Sequence[Layer]) -> Tensor:
        """The row of each head, (B, H, N) fp32."""
        return self.carry(layers[-1].stats.row, layers[:-1])

    @torch.no_grad()
    def carry(self, row: Tensor, earlier: Sequence[Layer]) -> Tensor:
        """The last layer's row of each head, (B, H, N) fp32, through the maps of the layers before it."""
        for layer in reversed(earlier):
            row = layer.times(row)
        return row

    def vecmats(self, number: int) -> int:
        return number


class Similarity(Criterion):
    """Cosine between the class token and each token as the block gave them out, moved to [0, 1].

    The class token itself scores 1: leave it out of the candidates.

    Source: GLSim (arXiv 2407.12891), global-local similarity.
    """

    kind, reason = "similarity", "similarity to the class token"

    def score(self, layers: Sequence[Layer]) -> Tensor:
        tokens = layers[-1].tokens
        require(tokens is not None, "similarity", "tokens", "given in the Layer", tokens)
        return (1 + F.cosine_similarity(tokens[:, :1].float(), tokens.float(), dim=-1)) / 2


@dataclass(frozen=True)
class Random(Criterion):
    """The control: scores that know nothing of the image. They differ by seed, layer, place in the batch and token,
    and are the same in every run, on every backend and device.

    Attributes:
        seed: at least 0.
    """

    kind: ClassVar[str] = "random"
    reason: ClassVar[str] = "chance"
    seed: int = 0

    def __post_init__(self) -> None:
        require(as_int("random", "seed", self.seed) >= 0, "random", "seed", "at least 0", self.seed)

    def score(self, layers: Sequence[Layer]) -> Tensor:
        row = layers[-1].stats.row
        place = torch.arange(row.shape[0], device=row.device).unsqueeze(1)
        token = torch.arange(row.shape[2], device=row.device)
        start = (self.seed * 1000003 + layers[-1].number * 7919) % PRIME
        mixed = start + place * 104729 + token * 15485863
        for _ in range(3):  # squares modulo a prime below 2^31 fit in int64, and every exporter knows them
            mixed = mixed % PRIME
            mixed = (mixed * mixed + 48271 * mixed + 1) % PRIME
        return mixed.float() / PRIME


_KINDS = (MAWS, ClassRow, Column, Vote, ATS, Received, Rollout, PSM, Similarity, Random)
maws, class_row, column, vote, ats, received, rollout, psm, similarity, random = (kind() for kind in _KINDS)
_CRITERIA = {criterion.kind: criterion for criterion in (kind() for kind in _KINDS)}


def names() -> tuple[str, ...]:
    """What `find` knows. "vote" and "random" take a number: "vote:12" votes a head, "random:7" the seed."""
    return tuple(_CRITERIA)


def find(criterion: str | Criterion) -> Criterion:
    """The criterion of a name, or the criterion itself.

    Raises:
        ValueError: an unknown name, or a number where there is none or that does not hold.
        TypeError: neither a name nor a criterion.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str):
        raise TypeError(f"criteria: criterion must be a name or a Criterion; got {type(criterion).__name__}")
    kind, colon, number = criterion.partition(":")
    known = _CRITERIA.get(kind)
    if known is None or (colon and not (fields(known) and number.isascii() and number.isdigit() and len(number) < 10)):
        must = f"one of {', '.join(names())} (vote:NUMBER, random:SEED)"
        raise ValueError(f"criteria: criterion must be {must}; got criterion={printable(repr(criterion))}")
    return type(known)(int(number)) if colon else known
