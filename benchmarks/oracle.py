"""The truth that attention is checked against: fp64, and plain matmuls in the dtype of the input."""

from __future__ import annotations

from torch import Tensor


def truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D) and score (B, N) in fp64, by explicit matmul."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = scale * q @ k.mT
    row, column = logits[:, :, 0].softmax(-1).mean(1), logits[..., 0].softmax(-1).mean(1)
    return (logits.softmax(-1) @ v).transpose(1, 2), row * column


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same attention as plain matmuls in the dtype of q: a backend may make twice its error."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2)


def rms(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference from the fp64 truth: a maximum would be one element's luck."""
    return (found.double() - expected).square().mean().sqrt().item()
