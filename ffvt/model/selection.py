"""What every model that selects tokens has in common: its result, how it is gathered, and its ways to run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffvt.criteria import Criterion, Layer, pick
from ffvt.kernels.ops import gather_tokens
from ffvt.model.reduction import TokenReduction


class Selection(NamedTuple):
    """What the first L-1 blocks picked; of a `TransFG`, what its H heads did.

    Attributes:
        index: (B, L-1, K) int64, the picks of every block, best first; (B, H), the pick of every head.
        score: (B, L-1, N) fp32, the score of every token in every block; (B, H, N), in every head.
    """

    index: Tensor
    score: Tensor

    @property
    def lines(self) -> Tensor:
        """index with one line per line of score: (B, L-1, K), or (B, H, 1)."""
        return self.index if self.index.ndim == 3 else self.index.unsqueeze(2)

    @classmethod
    def stack(cls, blocks: list[tuple[Tensor, Tensor]]) -> Selection:
        """The (index, score) of each block as one selection: (B, K) and (B, N) each."""
        index, score = zip(*blocks)
        return cls(torch.stack(index, dim=1), torch.stack(score, dim=1))


def without_registers(index: Tensor, num_prefix_tokens: int, num_tokens: int) -> Tensor:
    """Picks counted as where the class token alone stands before the patches: 0 for it and for every other token that
    is no patch, 1 for the first patch.

    num_tokens: N; that number is the token that token reduction makes of the patches it drops.
    """
    return torch.where(index < num_tokens, index - (num_prefix_tokens - 1), 0).clamp(min=0)


class Picker:
    """Gathers what the blocks of one forward pick.

    Args:
        criterion: scores the tokens of a block whose attention does not pick by itself.
        num_select: K.
        first_candidate: tokens [0, first_candidate) are never picked.
        reduction: which tokens are left, if some are dropped on the way.
        recomputes: whether the blocks run under activation checkpointing, which keeps none of their q and k.
    """

    def __init__(
        self,
        criterion: Criterion,
        num_select: int,
        first_candidate: int,
        reduction: TokenReduction | None = None,
        recomputes: bool = False,
    ) -> None:
        self.criterion, self.num_select, self.first_candidate = criterion, num_select, first_candidate
        self.reduction = reduction
        self.views = torch.is_grad_enabled() and not recomputes
        self.layers: list[Layer] = []
        self.picked: list[Tensor] = []
        self.chosen: list[tuple[Tensor, Tensor]] = []

    def judge(self, x: Tensor, layer: Layer) -> None:
        """Picks from a block's output (B, N, C), by what its attention left behind."""
        score = self.criterion([*self.layers, layer._replace(tokens=x.detach())])
        if self.criterion.needs_history:
            self.layers.append(layer.kept(self.views))
        index = pick(score, self.num_select, self.first_candidate)
        self.take(gather_tokens(x, index), index, score)

    def take(self, tokens: Tensor, index: Tensor, score: Tensor) -> None:
        """What a block picked by itself: its tokens (B, K, C), index (B, K) and score (B, N)."""
        self.picked.append(tokens)
        self.chosen.append((index, score) if self.reduction is None else self.reduction.original(index, score))

    def fused(self, x: Tensor) -> Tensor:
        """The class token of x (B, N, C) and every pick: (B, 1 + (L-1)K, C)."""
        return torch.cat([x[:, :1], *self.picked], dim=1)

    def selection(self) -> Selection:
        return Selection.stack(self.chosen)


class SelectingModel(nn.Module):
    """A model that selects tokens: a subclass writes `forward_features_with_selection` and has the attributes.

    Attributes:
        head: features (B, C) -> logits.
        num_selecting: blocks that pick tokens, or heads: the lines of a selection's score.
        first_candidate: tokens [0, first_candidate) are never picked.
        num_prefix_tokens: P, tokens before the patches, the class token first.
    """

    head: nn.Module
    num_selecting: int
    first_candidate: int
    num_prefix_tokens: int

    def forward(self, images: Tensor, need_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features, _ = self.forward_features_with_selection(images)
        return (self.head(features), features) if need_features else self.head(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> what `head` sees, (B, C)."""
        return self.forward_features_with_selection(images)[0]

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """Images (B, 3, S, S) -> logits (B, num_classes) and what every block picked."""
        features, selection = self.forward_features_with_selection(images)
        return self.head(features), selection

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """Images (B, 3, S, S) -> what `head` sees, (B, C), and what every block picked."""
        raise NotImplementedError
