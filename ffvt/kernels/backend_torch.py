"""The strong plain-PyTorch path: SDPA plus the one row and the one column that MAWS needs.

What: every operator for every device PyTorch runs on; the default wherever no kernel of ours serves.
How: attention through PyTorch's fused SDPA; row 0 and column 0 of the logits as two thin fp32 products per head.
Memory: nothing of N x N elements, forward or backward. On CPU the backward is PyTorch's flash backward from the saved
    lse; elsewhere it goes over tiles of query rows, so its scratch is TILE x N per head.
Limits: PyTorch's own. Its CPU SDPA gives zeros, not NaN, where a query holds NaN and there are fewer than 16 tokens,
    and where all logits of a query are -inf. Its CPU backward takes the probabilities from an lse that is rounded to
    fp32: they lose a digit for each digit of the logits past the first, and have no bound once these pass 1e7.
Source: FFVT section 3.2; the backward is FlashAttention's (Dao et al., arXiv 2205.14135), in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ffvt.kernels import reference
from ffvt.kernels.checks import check_index_range
from ffvt.kernels.reference import maws_score

TILE = 128  # query rows at a time, where a walk over tiles makes what SDPA does not

augment = reference.augment  # element by element: nothing to make faster
dropout = reference.dropout


def missing() -> list[str]:
    """Reasons why no call on this machine can be served: none."""
    return []


def unsupported(operator: str, *tensors: Tensor) -> list[str]:
    """Reasons why this backend cannot serve a call: none, it serves everything."""
    return []


def class_logits(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row 0 and column 0 of scale * q kT: (B, N, H, D) x 2 -> two (B, H, N), in fp32 (fp64 for fp64).

    A product and a sum rather than a matmul: matmul would round the logits to the input dtype, and would copy the
    strided heads first (1.5 ms against 3.9 ms at B=4 N=785 H=12 D=64, fp32, 2 cores).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.detach(), k.detach()
    row = (k * (q[:, :1].to(dtype) * scale)).sum(-1)  # (B, N, H)
    column = (q * (k[:, :1].to(dtype) * scale)).sum(-1)
    return row.transpose(1, 2), column.transpose(1, 2)


def select_top(score: Tensor, num_select: int, first_candidate: int) -> Tensor:
    """As `reference.select_top`, by a top-k over unique integer keys, so that no tie is left to the sort.

    A score is never negative, so its fp32 bits order as an integer; below them goes the inverted index.
    """
    candidates = score[:, first_candidate:]
    ranked = torch.where(candidates.isnan(), -1.0, candidates).contiguous()  # -1.0 has the sign bit: below every score
    index = torch.arange(candidates.shape[1], device=score.device)
    key = (ranked.view(torch.int32).long() << 32) | (0xFFFFFFFF - index)
    return key.topk(num_select, dim=-1, sorted=True).indices + first_candidate


def maws_select_forward(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor]:
    """q, k (B, N, H, D) -> index (B, K), score (B, N), from two thin products."""
    score = maws_score(*class_logits(q, k, scale))
    return select_top(score, num_select, first_candidate), score


def maws_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) -> out (B, N, H, D), index (B, K), score (B, N), lse (B, H, N), row_max (B, H, N) of zeros.

    lse is SDPA's on a CPU; elsewhere it is unused, and NaN.
    """
    index, score = maws_select_forward(q, k, num_select, scale, first_candidate)
    out, lse = _attend(q, k, v, scale)
    return out, index, score, lse, torch.zeros_like(lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """SDPA's out (B, N, H, D) and lse (B, H, N); lse of NaN where SDPA keeps it to itself."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]  # (B, H, N, D) views
    if keeps_lse(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, scale=scale)
        lse = lse.contiguous()
    else:
        out = F.scaled_dot_product_attention(*heads_first, scale=scale)
        shape, dtype = (q.shape[0], q.shape[2], q.shape[1]), torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(shape, torch.nan, dtype=dtype, device=q.device)
    return out.transpose(1, 2).contiguous(), lse


def attention_stats_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) -> out (B, N, H, D), row and column (B, H, N) fp32, lse (B, H, N), row_max of zeros.

    Where SDPA keeps its lse to itself, it is computed again, over tiles of query rows.
    """
    row, column = (line.softmax(-1).float() for line in class_logits(q, k, scale))
    out, lse = _attend(q, k, v, scale)
    if not keeps_lse(q):
        lse = row_lse(q, k, scale)
    return out, row, column, lse, torch.zeros_like(lse)


def row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Logarithm of the sum of exp(scale * q kT) of every query: q, k (B, N, H, D) -> (B, H, N)."""
    batch, num_tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, num_tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, logits in _row_tiles(q, k, scale):
        lse[:, :, rows] = logits.logsumexp(-1)
    return lse


def attention_vecmat_forward(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    """weights (B, H, N) times the map of q, k (B, N, H, D), over tiles of query rows: (B, H, N) fp32."""
    total = torch.zeros_like(weights, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, logits in _row_tiles(q, k, scale):
        tile_lse = logits.logsumexp(-1) if lse is None else lse[:, :, rows]
        probs = (logits - tile_lse.unsqueeze(-1)).exp()  # (B, H, T, N)
        total += (weights[:, :, None, rows].to(probs.dtype) @ probs).squeeze(-2)
    return total.float()


def _row_tiles(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """The logits of TILE queries at a time, (B, H, T, N), in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.permute(0, 2, 3, 1).to(dtype)  # (B, H, D, N); fp16 logits could overflow
    for start in range(0, q.shape[1], TILE):
        rows = slice(start, start + TILE)
        yield rows, scale * (q[:, rows].transpose(1, 2).to(dtype) @ keys)


def keeps_lse(q: Tensor) -> bool:
    """Whether SDPA hands out its lse for this tensor, so that its own flash backward can be called."""
    return q.device.type == "cpu" and q.numel() > 0


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
    """The gradient of `out` written into grads = (dq, dk, dv), each (B, N, H, D); row_max is unused."""
    if not keeps_lse(q):
        tiled_backward(grad_out, q, k, v, out, scale, grads)
        return
    heads_first = [t.transpose(1, 2) for t in (grad_out, q, k, v, out)]
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for target, grad in zip(grads, flash_backward(*heads_first, lse, 0.0, False, scale=scale)):
        target.copy_(grad.transpose(1, 2))


def tiled_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Backward over tiles of query rows, on any device, without an lse: each tile's softmax is recomputed."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.transpose(1, 2).to(dtype) for t in (k, v))  # (B, H, N, D); fp16 logits could overflow
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.shape[1], TILE):
        rows = slice(start, start + TILE)
        q_tile, d_out, out_tile = (t[:, rows].transpose(1, 2).to(dtype) for t in (q, grad_out, out))  # (B, H, T, D)
        probs = (scale * q_tile @ keys.mT).softmax(-1)  # (B, H, T, N)
        delta = (d_out * out_tile).sum(-1, keepdim=True)
        d_logits = scale * probs * (d_out @ values.mT - delta)
        grads[0][:, rows].copy_((d_logits @ keys).transpose(1, 2))
        dk += d_logits.mT @ q_tile
        dv += probs.mT @ d_out
    grads[1].copy_(dk.transpose(1, 2))
    grads[2].copy_(dv.transpose(1, 2))


def gather_tokens_forward(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, K) -> (B, K, C)."""
    if index.device.type == "cpu":
        check_index_range(index, x.shape[1])
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient (B, N, C) of the gathered input; a token picked twice receives the sum, in the dtype of grad."""
    if index.device.type == "cpu":
        check_index_range(index, num_tokens)
    batch = torch.arange(grad.shape[0], device=grad.device).unsqueeze(1).expand_as(index)
    target = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    return target.index_put_((batch, index), grad, accumulate=True)
