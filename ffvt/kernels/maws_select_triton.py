"""maws_select in Triton: scores and picks from the class token's row and column of logits, in one launch per layer.

What: `pick` turns row and col (B, H, N) into index (B, K) int64 and score (B, N) fp32; `maws_select_forward`
    computes the two lines first, reading q and k once.
How: one program per image holds a score per token; it goes through the heads a few at a time (softmax of both lines in
    fp32, added up), multiplies the two means, and takes the top K of unique integer keys: the score's bits above, the
    inverted index below. So order and ties are exact, and no sort's stability matters.
Memory: row and col, 2 (B, H, N) fp32, for `maws_select_forward`; nothing else for `pick`.
Limits: N up to 8,192, as the scores of an image live in one program's registers.
Source: FFVT (arXiv 2107.02341), section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.tiles_triton import dot_row, head_of, load_row, load_tile, strided


def pick(row: Tensor, col: Tensor, num_select: int, first_candidate: int) -> tuple[Tensor, Tensor]:
    """index (B, K) int64, best first, and score (B, N) fp32; launches on the current device."""
    B, H, N = row.shape
    index = torch.empty(B, num_select, dtype=torch.int64, device=row.device)
    score = torch.empty(B, N, dtype=torch.float32, device=row.device)
    config = tuning.select_config(tuning.architecture(row.device), N, num_select)
    if B:
        select_kernel[(B,)](
            *(row, col, score, index, N, H, num_select, first_candidate), **config.constants, **config.options
        )
    return index, score


def maws_select_forward(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor]:
    """index (B, K) int64 and score (B, N) fp32 from q, k (B, N, H, D)."""
    B, N, H, D = q.shape
    row, col = (torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(2))
    config = tuning.CLASS_LOGITS
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if B:
            grid = (triton.cdiv(N, config.constants["BLOCK"]) * B * H,)
            class_logits_kernel[grid](
                *(strided(q), strided(k), row, col, N, H, scale, D), **config.constants, **config.options
            )
        return pick(row, col, num_select, first_candidate)


@triton.jit(do_not_specialize=["N", "H"])
def class_logits_kernel(q, k, row_ptr, col_ptr, N, H, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """row[j] = scale k_j q_0 and col[i] = scale q_i k_0 for BLOCK tokens of one head."""
    tiles = tl.cdiv(N, BLOCK)
    bh = tl.program_id(0) // tiles
    offs = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    q, k = head_of(q, bh, H), head_of(k, bh, H)
    line = bh.to(tl.int64) * N + offs
    q_class, k_tile = load_row(q, D), load_tile(k, offs, mask, D)
    tl.store(row_ptr + line, dot_row(k_tile, q_class) * scale, mask=mask)
    k_class, q_tile = load_row(k, D), load_tile(q, offs, mask, D)
    tl.store(col_ptr + line, dot_row(q_tile, k_class) * scale, mask=mask)


@triton.jit
def softmax_of_lines(lines_ptr, offs, mask):
    """Softmax of each line of logits (HEADS, BLOCK) over its tokens."""
    s = tl.load(lines_ptr + offs, mask=mask[None, :], other=float("-inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def sum_of_softmaxes(lines_ptr, offs, mask, counted):
    """The same summed over the counted lines: (BLOCK,)."""
    return tl.sum(tl.where(counted[:, None], softmax_of_lines(lines_ptr, offs, mask), 0.0), 0)


@triton.jit(do_not_specialize=["N", "H", "K", "first_candidate"])
def select_kernel(
    row_ptr, col_ptr, score_ptr, index_ptr, N, H, K, first_candidate,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One image: BLOCK >= N scores, the TOP >= K largest of them in order."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    mask = token < N
    cls_attention = tl.zeros((BLOCK,), tl.float32)
    contribution = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)
        offs = (image * H + tl.minimum(head, H - 1)[:, None]) * N + token[None, :]
        cls_attention += sum_of_softmaxes(row_ptr, offs, mask, head < H)
        contribution += sum_of_softmaxes(col_ptr, offs, mask, head < H)
    score = (cls_attention / H) * (contribution / H)
    tl.store(score_ptr + image * N + token, score, mask=mask)
    rank = tl.where(score == score, score.to(tl.int32, bitcast=True), -1)  # scores are >= 0: their bits order; NaN last
    rank = tl.where(mask & (token >= first_candidate), rank, -2)
    key = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)  # unique, lower index first among equals
    index = 0x7FFFFFFF - (tl.topk(key, TOP) & 0x7FFFFFFF)
    place = tl.arange(0, TOP)
    tl.store(index_ptr + image * K + place, index, mask=place < K)
