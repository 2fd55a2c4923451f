"""The operators as plain PyTorch, for programs that must run where this package is not: exporters and other run times.

What: the forward of every operator of `torch.ops.ffvt` that a model calls, in operations that every exporter knows.
How: attention by scaled_dot_product_attention; row 0 and column 0 of the logits as two thin fp32 products per head; the
    picks by topk of fp64 keys in which the position breaks ties, so that equal scores keep their order everywhere.
Memory: nothing of N x N elements beyond what the run time's own attention keeps; attention_vecmat, and the lse of
    attention_stats where it is read, make one such map.
Limits: no gradient. The forced backend is ignored, and nothing is checked: the traced program has been.
Source: FFVT section 3.2; `backend_torch` is the same for the device at hand, `reference` defines it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffvt.kernels import registration  # noqa: F401  defines torch.ops.ffvt
from ffvt.kernels.backend_torch import class_logits
from ffvt.kernels.reference import attention_logits, attention_vecmat_forward, maws_score

LIMIT = 1e38  # scores beyond it tie; twice that is still a number of fp32, which exporters ask of constants


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What each operator of this package does, as plain PyTorch: a table for exporters.

    `torch.export.export(model, (images,)).run_decompositions(ffvt.decompositions())` is a program without an operator
    of ours. It runs without this package, and `torch.onnx.export` takes it.

    Returns:
        {torch.ops.ffvt.X.default: function of the same arguments}, for maws_attention, maws_attention_qkvpacked,
        attention_stats, attention_vecmat, maws_select and gather_tokens. Forward only. Of the attentions' lse and
        row_max the functions return the lse, and zeros.
    """
    operators = torch.ops.ffvt
    return {
        operators.maws_attention.default: _maws_attention,
        operators.maws_attention_qkvpacked.default: _maws_attention_qkvpacked,
        operators.attention_stats.default: _attention_stats,
        operators.attention_vecmat.default: _attention_vecmat,
        operators.maws_select.default: _maws_select,
        operators.gather_tokens.default: _gather_tokens,
    }


def _maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    index, score = _maws_select(q, k, num_select, scale, first_candidate, backend)
    out, lse = _attend(q, k, v, scale)
    return out, index, score, lse, torch.zeros_like(lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D), and lse (B, H, N), which a program leaves out where nobody reads it."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]  # (B, H, N, D)
    out = F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()
    return out, attention_logits(q, k, scale).logsumexp(-1)


def _maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _maws_attention(*qkv.unbind(2), num_select, scale, first_candidate, backend)


def _attention_stats(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    row, column = (line.softmax(-1).float() for line in class_logits(q, k, scale))
    out, lse = _attend(q, k, v, scale)
    return out, row, column, lse, torch.zeros_like(lse)


def _attention_vecmat(
    weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    return attention_vecmat_forward(weights, q, k, lse, q.shape[-1] ** -0.5 if scale is None else scale)


def _maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor]:
    score = maws_score(*class_logits(q, k, q.shape[-1] ** -0.5 if scale is None else scale))
    return select_top(score, num_select, first_candidate), score


def select_top(score: Tensor, num_select: int, first_candidate: int) -> Tensor:
    """As `reference.select_top`, of scores of either sign: (B, N) -> (B, K).

    In fp64 a score becomes smaller by 2**-40 of itself per position: too little to pass another fp32 number, enough to
    tell equal ones apart. A second, tiny term does that for scores of zero.
    """
    candidates = score[:, first_candidate:].double()
    position = torch.arange(candidates.shape[1], dtype=torch.float64, device=score.device)
    finite = candidates.clamp(-LIMIT, LIMIT)
    key = finite - finite.abs() * (2.0**-40 * position) - 1e-300 * position
    key = torch.where(candidates.isnan(), -2 * LIMIT * (1 + 2.0**-40 * position), key)
    return key.topk(num_select, dim=-1, sorted=True).indices + first_candidate


def _gather_tokens(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
