"""One attention to measure: its sizes, dtype and device, and its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffvt.precision import dtype_of


@dataclass(frozen=True)
class Problem:
    """An attention of B images, N tokens, H heads and D channels a head that selects K tokens.

    Attributes:
        batch: B.
        tokens: N.
        heads: H.
        head_dim: D.
        dtype: a name of `ffvt.precision.PRECISIONS`.
        device: "cpu" or "cuda".
        num_select: K.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    device: str = "cpu"
    num_select: int = 12

    def __str__(self) -> str:
        return f"B={self.batch} N={self.tokens} H={self.heads} D={self.head_dim} {self.dtype}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, N, H, D)."""
        return self.batch, self.tokens, self.heads, self.head_dim

    @property
    def forward_flops(self) -> int:
        """Useful operations of the forward, never padding: 4 B H N^2 D."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def inputs(self) -> tuple[Tensor, Tensor]:
        """qkv (B, N, 3, H, D) and the gradient of out (B, N, H, D), the same ones every time."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (self.batch, self.tokens, 3, self.heads, self.head_dim)
        qkv = 1.5 * torch.randn(size, generator=generator, device=self.device)
        grad_out = torch.randn(self.shape, generator=generator, device=self.device)
        return qkv.to(dtype_of(self.dtype)), grad_out.to(dtype_of(self.dtype))
