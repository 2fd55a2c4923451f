"""What every model that selects tokens has in common: its result, and its ways to run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Selection(NamedTuple):
    """What the first L-1 blocks picked.

    Attributes:
        index: (B, L-1, K) int64, the picks of every block, best first.
        score: (B, L-1, N) fp32, the score of every token in every block.
    """

    index: Tensor
    score: Tensor

    @classmethod
    def stack(cls, blocks: list[tuple[Tensor, Tensor]]) -> Selection:
        """The (index, score) of each block as one selection: (B, K) and (B, N) each."""
        index, score = zip(*blocks)
        return cls(torch.stack(index, dim=1), torch.stack(score, dim=1))


def without_registers(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Picks counted as where the class token alone stands before the patches: 0 for it and for every other token that
    is no patch, 1 for the first patch."""
    return (index - (num_prefix_tokens - 1)).clamp(min=0)


class SelectingModel(nn.Module):
    """A model that selects tokens: a subclass writes `forward_features_with_selection` and has the attributes.

    Attributes:
        head: features (B, C) -> logits.
        num_selecting: blocks that pick tokens.
        first_candidate: tokens [0, first_candidate) are never picked.
        num_prefix_tokens: P, tokens before the patches, the class token first.
    """

    head: nn.Module
    num_selecting: int
    first_candidate: int
    num_prefix_tokens: int

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features_with_selection(images)[0])

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
