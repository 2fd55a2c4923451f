"""Token reduction: after some blocks, the patches that the class token attends to least become one token.

How: the patches of largest class row (the mean of the heads) stay, in order of position; the rest become their sum,
    weighted by the row, one token at the end. The earlier such token always joins the rest. What a block costs falls
    with the tokens left. The weights carry no gradient.
Source: EViT (Liang et al., ICLR 2022, arXiv 2202.07800), which drops between attention and MLP; here a block is run to
    its end, so that every library's blocks serve.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ffvt.criteria import Layer, pick
from ffvt.kernels.ops import gather_tokens


class TokenReduction:
    """The tokens left in one forward.

    Args:
        keep_rate: fraction of the patches left that stay, at each reduction.
        num_tokens: N, tokens at the start; only `original` reads it.
    """

    def __init__(self, keep_rate: float, num_tokens: int = 0) -> None:
        self.keep_rate, self.num_tokens = keep_rate, num_tokens
        self.positions: Tensor | None = None  # (B, M), where the tokens left stood at the start; not the fused one

    def reduce(self, x: Tensor, layer: Layer) -> Tensor:
        """A block's output (B, N, C) -> prefix, patches that stay and fused token, (B, M + 1, C)."""
        weight, prefix = layer.stats.row.mean(1), layer.num_prefix_tokens  # (B, N)
        patches = x.shape[1] - prefix - (self.positions is not None)
        best = pick(weight[:, prefix : prefix + patches], math.ceil(self.keep_rate * patches))
        first = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        index = torch.cat([first, prefix + best.sort(dim=1).values], dim=1)  # (B, M)
        rest = weight.scatter(1, index, 0.0).unsqueeze(1).to(x.dtype)
        self.positions = index if self.positions is None else self.positions.gather(1, index)
        return torch.cat([gather_tokens(x, index), rest @ x], dim=1)

    def original(self, index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Picks (B, K) and scores of the tokens left, as of those at the start: (B, K), (B, N).

        The fused token has the number N, no token at the start; tokens that were dropped score 0.
        """
        if self.positions is None:
            return index, score
        left = self.positions.shape[1]
        whole = score.new_zeros(score.shape[0], self.num_tokens).scatter(1, self.positions, score[:, :left])
        return F.pad(self.positions, (0, 1), value=self.num_tokens).gather(1, index), whole
