"""The public operators.

Each applies autocast and makes one registered call, `torch.ops.ffvt.<operator>`, that autograd, `torch.compile`,
`torch.export` and CUDA graphs see as one opaque node, and that checks its arguments (`registration.py`).

Gradients are those of `backward()` and `torch.autograd.grad`, once. There is no forward mode (`torch.func.jvp`), no
second gradient, and no `torch.func.grad` or `vjp`: PyTorch does not carry a registered operator's gradient into them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ffvt.kernels import registration  # noqa: F401  defines torch.ops.ffvt
from ffvt.kernels.backends import forced_backend
from ffvt.kernels.checks import as_int, as_scale, check_tensors, prepare


def maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that also picks the tokens with the largest mutual attention weight.

    Args:
        q, k, v: (B, N, H, D), one dtype of fp16, bf16, fp32, fp64, any strides with unit last stride. Token 0 is the
            class token. Under autocast they are cast to its dtype.
        num_select: K, how many tokens to pick, 1 <= K <= N - first_candidate.
        scale: factor of the logits, finite and positive; 1/sqrt(D) when None.
        first_candidate: tokens [0, first_candidate) are never picked; 0 is the authors' behaviour (the class token
            can be picked), 1 leaves out the class token.

    Returns:
        out: (B, N, H, D), dtype of q, contiguous. The only result that carries a gradient.
        index: (B, K) int64, best first; equal scores: lower index first; NaN ranks last.
        score: (B, N) fp32, mean_h softmax(S_h[0, :]) * mean_h softmax(S_h[:, 0]), of every token.

    Raises:
        ValueError: a shape, a stride or a value does not hold.
        TypeError: a dtype or a type does not.
        NotImplementedError: a backend forced by `use_backend` cannot serve the call; or forward mode.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention"
    q, k, v = prepare(name, q=q, k=k, v=v)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_attention(q, k, v, *selection, forced_backend())[:3]


def maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`maws_attention` on packed q, k, v: no copy on the way in, one packed gradient on the way out.

    Args:
        qkv: (B, N, 3, H, D), fp16, bf16, fp32 or fp64, any strides with unit last stride: the view of one linear
            layer's output.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        out (B, N, H, D), index (B, K) int64, score (B, N) fp32, as `maws_attention`. Only out carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention_qkvpacked"
    (qkv,) = prepare(name, qkv=qkv)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_attention_qkvpacked(qkv, *selection, forced_backend())[:3]


class AttentionStats(NamedTuple):
    """What one attention says of its tokens. None of it carries a gradient.

    Attributes:
        row: (B, H, N) fp32, softmax(S_h[0, :]): how much the class token attends to each token, in every head.
        column: (B, H, N) fp32, softmax(S_h[:, 0]): each token's logit of the class token, as a share of all tokens'.
        lse: (B, H, N) fp32 (fp64 for fp64 inputs), log sum_j exp(S_h[i, j]) of every query i. With it,
            exp(S_h[i, j] - lse[i]) is any probability of the map, to about 2**-23 * |lse| of itself.
    """

    row: Tensor
    column: Tensor
    lse: Tensor


def attention_stats(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, AttentionStats]:
    """Softmax attention that also gives the class token's row and column, per head, and every query's lse.

    Args:
        q, k, v, scale: as for `maws_attention`.

    Returns:
        out: (B, N, H, D), dtype of q, contiguous. The only result that carries a gradient.
        stats: `AttentionStats`; stats.row.mean(1) * stats.column.mean(1) is the score of `maws_attention`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2, for the two lines.
    """
    name = "attention_stats"
    q, k, v = prepare(name, q=q, k=k, v=v)
    scale = as_scale(name, scale)
    out, row, column, lse, row_max = torch.ops.ffvt.attention_stats(q, k, v, scale, forced_backend())
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return out, AttentionStats(row, column, lse + factor * row_max)


def attention_vecmat(
    weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """A row vector times the attention map of every head, without the map: y_j = sum_i weights_i softmax(S_h[i, :])_j.

    Chained over the layers, last layer first, it is one row of the product of their maps.

    Args:
        weights: (B, H, N) fp32, any strides.
        q, k, scale: as for `maws_attention`.
        lse: (B, H, N) fp32 (fp64 for fp64 inputs), as `attention_stats` gives it for the same q, k and scale; None
            computes it, at the cost of one more product of q and k where it is not fused in. With logits past about
            1e4 that is the more accurate way.

    Returns:
        (B, H, N) fp32. It carries no gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: TransFG (arXiv 2103.07976), section 3.3, whose product of maps it replaces.
    """
    name = "attention_vecmat"
    given = {"weights": weights} if lse is None else {"weights": weights, "lse": lse}
    check_tensors(name, **given)
    q, k = prepare(name, q=q, k=k)
    lse = None if lse is None else lse.detach()
    scale = as_scale(name, scale)
    return torch.ops.ffvt.attention_vecmat(weights.detach(), q.detach(), k.detach(), lse, scale, forced_backend())


def maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """The picks of `maws_attention` without the attention: two thin products per head.

    Args:
        q, k: (B, N, H, D), as for `maws_attention`.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        index: (B, K) int64, best first. score: (B, N) fp32. Neither carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_select"
    q, k = prepare(name, q=q, k=k)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_select(q.detach(), k.detach(), *selection, forced_backend())


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Picks tokens: row index[b, i] of image b.

    Args:
        x: (B, N, C), fp16, bf16, fp32 or fp64.
        index: (B, K) int64, each in [0, N). The picks of one image are usually distinct; a repeated one receives the
            sum of its gradients.

    Returns:
        (B, K, C), dtype of x, contiguous. Carries a gradient to x.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: x is not floating point, index not int64.
        IndexError: an index outside [0, N) (CPU tensors; on a GPU it is not read back: the kernel gives a row of NaN).

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    check_tensors("gather_tokens", x=x, index=index)
    return torch.ops.ffvt.gather_tokens(x, index, forced_backend())


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that keeps no mask: the backward makes it again, from a seed that the forward draws.

    Args:
        x: any shape, fp16, bf16, fp32 or fp64.
        p: probability that an element becomes zero, 0 <= p < 1; the others are divided by 1 - p.

    Returns:
        The shape and dtype of x, contiguous. Carries a gradient to x.

    Raises:
        ValueError: p is outside. TypeError: x is not floating point.

    The seed comes from PyTorch's default generator of the CPU, so `torch.manual_seed` and its saved state decide the
    masks, on any number of threads. They are others than those of `torch.nn.functional.dropout`.
    """
    check_tensors("dropout", x=x)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return torch.ops.ffvt.dropout(x, seed, p, forced_backend())


def _selection(name: str, num_select: int, scale: float | None, first_candidate: int) -> tuple[int, float | None, int]:
    num_select = as_int(name, "num_select", num_select)
    return num_select, as_scale(name, scale), as_int(name, "first_candidate", first_candidate)
