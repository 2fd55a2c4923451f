"""The operations of the registered operators, as torch.utils.flop_counter counts them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register() -> None:
    """Counts the products of q and k, and of the probabilities and v; 2.5 times that in the backward, its recomputed
    logits included."""
    operators = torch.ops.ffvt

    @register_flop_formula([operators.maws_attention, operators.maws_attention_qkvpacked, operators.attention_stats])
    def _forward(first: tuple[int, ...], *_: Any, **__: Any) -> int:
        return _attention(first, 4)

    @register_flop_formula([operators.maws_attention_backward, operators.maws_attention_qkvpacked_backward])
    def _backward(grad_out: tuple[int, ...], first: tuple[int, ...], *_: Any, **__: Any) -> int:
        return _attention(first, 10)

    @register_flop_formula(operators.attention_vecmat)
    def _vecmat(weights: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], lse: Any, *_: Any, **__: Any) -> int:
        return _attention(q, 2 if lse is not None else 4)

    @register_flop_formula(operators.maws_select)
    def _select(q: tuple[int, ...], *_: Any, **__: Any) -> int:
        batch, num_tokens, heads, head_dim = q
        return 4 * batch * heads * num_tokens * head_dim


def _attention(shape: tuple[int, ...], factor: int) -> int:
    """factor * B H N^2 D, of a shape (B, N, H, D) or (B, N, 3, H, D)."""
    batch, num_tokens, *_, heads, head_dim = shape
    return factor * batch * heads * num_tokens**2 * head_dim
