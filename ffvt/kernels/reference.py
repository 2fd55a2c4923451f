"""The definition of truth: every operator in explicit PyTorch, forward and backward.

What: softmax attention with mutual attention weight selection (MAWS) or with its statistics, the selection alone, a
    row vector times the attention map, and the token gather.
How: the N x N map is materialised, in fp32 (fp64 for fp64 inputs) whatever the input dtype. Nothing here is fast.
Source: FFVT (Wang, Yu, Gao; BMVC 2021; arXiv 2107.02341), section 3.2.

Every other backend is checked against this file. The plain functions (`maws_attention`, ...) are differentiable by
autograd; the `*_forward` / `*_backward` pairs are what `use_backend("reference")` runs, with the gradient written out.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from ffvt.kernels.checks import check_index_range

GREY = (0.2989, 0.587, 0.114)  # of red, green, blue; torchvision's, which is ITU-R 601's
ORDERS = tuple(permutations(range(3)))  # of brightness, contrast, saturation


def missing() -> list[str]:
    """Reasons why no call on this machine can be served: none."""
    return []


def unsupported(operator: str, *tensors: Tensor) -> list[str]:
    """Reasons why this backend cannot serve a call: none, it serves everything."""
    return []


def attention_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled logits S = scale * q kT, (B, N, H, D) x 2 -> (B, H, N, N), in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return scale * (q.to(dtype).transpose(1, 2) @ k.to(dtype).permute(0, 2, 3, 1))


def maws_score(row: Tensor, column: Tensor) -> Tensor:
    """Mutual attention weight from the class token's row and column of the logits.

    row, column: (B, H, N), the logits S[0, :] and S[:, 0] of every head. Returns (B, N) fp32: the product of the two
    head-means of their softmaxes, in that order (the mean comes before the product).
    """
    cls_attention = row.softmax(-1).mean(1)
    contribution = column.softmax(-1).mean(1)
    return (cls_attention * contribution).float()


def select_top(score: Tensor, num_select: int, first_candidate: int) -> Tensor:
    """Indices of the largest scores, best first; equal scores: lower index first; NaN ranks last.

    score: (B, N). Tokens [0, first_candidate) are never picked. Returns (B, K) int64.
    """
    candidates = score[:, first_candidate:]
    ranked = torch.where(candidates.isnan(), -torch.inf, candidates)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_select] + first_candidate


def maws_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) -> out (B, N, H, D), index (B, K) int64, score (B, N) fp32, lse (B, H, N), and row_max
    (B, H, N), which is zero: the backward needs neither."""
    logits = attention_logits(q, k, scale)
    score = maws_score(logits[:, :, 0, :], logits[:, :, :, 0]).detach()
    index = select_top(score, num_select, first_candidate)
    out, lse = _attend(logits, v)
    return out, index, score, lse, torch.zeros_like(lse)


def _attend(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, H, N, N), v (B, N, H, D) -> out (B, N, H, D) in the dtype of v, lse (B, H, N)."""
    lse = logits.logsumexp(-1)
    out = (logits - lse.unsqueeze(-1)).exp() @ v.to(logits.dtype).transpose(1, 2)  # (B, H, N, D)
    return out.transpose(1, 2).to(v.dtype).contiguous(), lse


def maws_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The gradient of `out` written into grads = (dq, dk, dv), each (B, N, H, D).

    Works from q, k, v and grad_out alone: out, lse and row_max are what a backend may reuse, and truth needs none.
    """
    probs = attention_logits(q, k, scale).softmax(-1)  # (B, H, N, N)
    d_out = grad_out.to(probs.dtype).transpose(1, 2)  # (B, H, N, D)
    d_probs = d_out @ v.to(probs.dtype).permute(0, 2, 3, 1)  # (B, H, N, N)
    delta = (probs * d_probs).sum(-1, keepdim=True)
    d_logits = probs * (d_probs - delta)
    dq, dk, dv = grads
    dq.copy_((scale * d_logits @ k.to(probs.dtype).transpose(1, 2)).transpose(1, 2))
    dk.copy_((scale * d_logits.mT @ q.to(probs.dtype).transpose(1, 2)).transpose(1, 2))
    dv.copy_((probs.mT @ d_out).transpose(1, 2))


def attention_stats_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) -> out (B, N, H, D), row and column (B, H, N) fp32, lse (B, H, N), and row_max, zero."""
    logits = attention_logits(q, k, scale)
    row, column = logits[:, :, 0, :].softmax(-1).float(), logits[:, :, :, 0].softmax(-1).float()
    out, lse = _attend(logits, v)
    return out, row.detach(), column.detach(), lse.detach(), torch.zeros_like(lse)


def attention_vecmat_forward(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    """weights (B, H, N) times the map of q, k (B, N, H, D): (B, H, N) fp32. lse (B, H, N), or None."""
    logits = attention_logits(q, k, scale)
    lse = logits.logsumexp(-1) if lse is None else lse
    probs = (logits - lse.unsqueeze(-1)).exp()  # (B, H, N, N)
    return (weights.to(probs.dtype).unsqueeze(-2) @ probs).squeeze(-2).float()


def maws_select_forward(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor]:
    """q, k (B, N, H, D) -> index (B, K) int64, score (B, N) fp32."""
    logits = attention_logits(q, k, scale)
    score = maws_score(logits[:, :, 0, :], logits[:, :, :, 0])
    return select_top(score, num_select, first_candidate), score


def gather_tokens_forward(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, K) -> (B, K, C): row index[b, i] of image b."""
    check_index_range(index, x.shape[1])
    rows = [image[picks] for image, picks in zip(x, index)]
    return torch.stack(rows) if rows else x.new_empty(0, index.shape[1], x.shape[2])


def gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient (B, N, C) of the gathered input; a token picked twice receives the sum."""
    check_index_range(index, num_tokens)
    one_hot = torch.nn.functional.one_hot(index, num_tokens).to(
        torch.promote_types(grad.dtype, torch.float32)
    )  # (B, K, N)
    return (one_hot.mT @ grad.to(one_hot.dtype)).to(grad.dtype)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p, as the seed, one int64, says; the others over 1 - p."""
    words = seed.to(x.device)
    low, high = words & _WORD, (words >> 32) & _WORD
    place = torch.arange(x.numel(), device=x.device)
    first = _mix((place & _WORD) ^ ((low + _mix(place >> 32)) & _WORD))
    stays = _mix((first + high) & _WORD) >= min(int(p * 2**32), _WORD)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = stays.to(wide.dtype) * (1 / (1 - p))  # the quotient is rounded to fp32 once, as in C++
    return (wide * factors.view(x.shape)).to(x.dtype)


_WORD = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """lowbias32, a hash of 32-bit integers (C. Wellons' hash prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def augment(images: Tensor, jitter: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Colour jitter and normalisation of images (B, 3, H, W) uint8 into out, fp32, contiguous.

    jitter: (B, 4), factors of brightness, contrast and saturation, and the number of their order in `ORDERS`; empty for
    none. Each blends with black, the mean grey or the grey, and clamps to [0, 255]. scale, shift: (3,).
    """
    out.copy_(images)
    if jitter.numel():
        _jitter_(out, jitter)
    out.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))


def _jitter_(images: Tensor, jitter: Tensor) -> None:
    weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
    orders = torch.tensor(ORDERS, device=images.device)[jitter[:, 3].long()]  # (B, 3)
    for stage in range(3):
        kind = orders[:, stage].view(-1, 1, 1, 1)
        factor = jitter.gather(1, orders[:, stage : stage + 1]).view(-1, 1, 1, 1)
        grey = (images * weights).sum(1, keepdim=True)
        other = torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey) * (kind > 0)
        images.mul_(factor).add_(other * (1 - factor)).clamp_(0, 255)


def maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`ffvt.maws_attention`, by the book: out (B, N, H, D), index (B, K) int64, score (B, N) fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return maws_attention_forward(q, k, v, num_select, scale, first_candidate)[:3]


def maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`ffvt.maws_attention_qkvpacked`, by the book: qkv (B, N, 3, H, D)."""
    return maws_attention(*qkv.unbind(2), num_select, scale, first_candidate)


def attention_stats(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`ffvt.attention_stats`, by the book: out (B, N, H, D), (row, column, lse) (B, H, N) each."""
    out, *stats, _ = attention_stats_forward(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return out, tuple(stats)


def attention_vecmat(
    weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`ffvt.attention_vecmat`, by the book: (B, H, N) fp32; no gradient."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_vecmat_forward(weights.detach(), q.detach(), k.detach(), lse, scale)


def maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """`ffvt.maws_select`, by the book: index (B, K) int64, score (B, N) fp32; no gradient."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return maws_select_forward(q.detach(), k.detach(), num_select, scale, first_candidate)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`ffvt.gather_tokens`, by the book: x (B, N, C), index (B, K) -> (B, K, C)."""
    return gather_tokens_forward(x, index)
