"""What a criterion is given, what it is, and how the best tokens are taken; `ffvt.criteria` has the criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ffvt.kernels.checks import as_int, check_selection, check_tensors
from ffvt.kernels.decompositions import select_top
from ffvt.kernels.ops import AttentionStats, attention_vecmat


class Layer(NamedTuple):
    """What the attention of one block left behind.

    Attributes:
        q, k, v: (B, N, H, D), as the attention multiplied them; only `ats` reads v.
        stats: of the same call of `attention_stats`.
        tokens: (B, N, C), what the block gave out; only `similarity` reads it.
        scale: factor of the logits; 1/sqrt(D) when None.
        num_prefix_tokens: P, tokens before the patches, the class token first.
        number: of the layer, from 0; only `random` reads it.
        grid: rows and columns of the patches; a square when None; only `vote` reads it.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    stats: AttentionStats
    tokens: Tensor | None = None
    scale: float | None = None
    num_prefix_tokens: int = 1
    number: int = 0
    grid: tuple[int, int] | None = None

    def kept(self, views: bool) -> Layer:
        """What the criteria of later layers read. views: of a projection that a backward keeps anyway; else copies,
        which let go of v."""
        layer = self._replace(v=None, tokens=None)
        return layer if views else layer._replace(q=self.q.clone(), k=self.k.clone())

    def times(self, weights: Tensor) -> Tensor:
        """weights (B, H, N) times the map of every head: (B, H, N) fp32."""
        return attention_vecmat(weights, self.q, self.k, self.stats.lse.detach(), self.scale)


@dataclass(frozen=True)
class Criterion:
    """Scores the tokens of the last of some layers: `criterion(layers)` -> (B, N) fp32, never negative.

    Attributes:
        kind: what `find` knows it by.
        reason: by what it picks, in words.
        needs_history: whether it reads the layers before the last.
        needs_every_token: whether it cannot do without those that token reduction drops.
        is_fused: whether attention picks by it in one launch (`maws_attention`).
    """

    kind: ClassVar[str] = ""
    reason: ClassVar[str] = ""
    needs_history: ClassVar[bool] = False
    needs_every_token: ClassVar[bool] = False
    is_fused: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Its kind and, where it is not the usual one, its number: "vote", "vote:12"."""
        numbers = [getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default]
        return ":".join([self.kind, *map(str, numbers)])

    @torch.no_grad()
    def __call__(self, layers: Sequence[Layer]) -> Tensor:
        if isinstance(layers, Layer) or not layers:
            got = f"{type(layers).__name__} of {len(layers)}"
            raise ValueError(f"{self.kind}: layers must be a sequence of at least one Layer; got {got}")
        return self.score(layers).float()

    def score(self, layers: Sequence[Layer]) -> Tensor:
        raise NotImplementedError

    def vecmats(self, number: int) -> int:
        """How many times layer `number`, counted from 0, asks for a vector times a map."""
        return 0


def pick(score: Tensor, num_select: int, first_candidate: int = 0) -> Tensor:
    """The tokens of the largest scores, best first; equal scores: lower index first; NaN ranks last.

    Args:
        score: (B, N) fp32.
        num_select: K, 1 <= K <= N - first_candidate.
        first_candidate: tokens [0, first_candidate) are never picked.

    Returns:
        (B, K) int64.

    Raises:
        ValueError: a shape or a value does not hold. TypeError: the score is no tensor, or a count no integer.
    """
    check_tensors("pick", score=score)
    num_select, first_candidate = (
        as_int("pick", "num_select", num_select),
        as_int("pick", "first_candidate", first_candidate),
    )
    if score.ndim != 2:
        raise ValueError(f"pick: score must be (B, N); got score.shape={tuple(score.shape)}")
    check_selection("pick", score.shape[1], num_select, first_candidate)
    return select_top(score.detach(), num_select, first_candidate)
