"""maws_select in Triton: scores and picks from the class token's row and column of logits, in one launch per layer.

What: `pick` turns row and column (B, H, N) into index (B, K) int64 and score (B, N) fp32; `maws_select_forward`
    computes the two lines first, reading q and k once.
How: one program per image holds a score per token; it goes through the heads a few at a time (softmax of both lines in
    fp32, added up), multiplies the two means, and takes the top K of unique integer keys: the score's bits above, the
    inverted index below. So order and ties are exact, and no sort's stability matters.
Memory: row and column, 2 (B, H, N) fp32, for `maws_select_forward`; nothing else for `pick`.
Limits: N up to 8,192, as the scores of an image live in one program's registers.
Source: FFVT (arXiv 2107.02341), section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.tiles_triton import head_blocks, head_start, load_tile, load_vector, multiply_vector


def pick(row: Tensor, column: Tensor, num_select: int, first_candidate: int) -> tuple[Tensor, Tensor]:
    """index (B, K) int64, best first, and score (B, N) fp32."""
    batch, heads, tokens = row.shape
    index = torch.empty(batch, num_select, dtype=torch.int64, device=row.device)
    score = torch.empty(batch, tokens, dtype=torch.float32, device=row.device)
    config = tuning.select(tuning.architecture(row.device), tokens, num_select)
    if batch:
        select_kernel[(batch,)](
            *(row, column, score, index, tokens, heads, num_select, first_candidate),
            **config.constants,
            **config.options,
        )
    return index, score


def maws_select_forward(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor]:
    """index (B, K) int64 and score (B, N) fp32 from q, k (B, N, H, D)."""
    batch, tokens, heads, head_dim = q.shape
    row, column = (torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device) for _ in range(2))
    config = tuning.class_logits()
    low, high = head_blocks(head_dim)
    if batch:
        class_logits_kernel[config.grid(tokens, batch * heads)](
            *(q, k, row, column),
            *(*q.stride()[:3], *k.stride()[:3]),
            *(tokens, heads, scale),
            D=head_dim,
            LOW=low,
            HIGH=high,
            **config.constants,
            **config.options,
        )
    return pick(row, column, num_select, first_candidate)


@triton.jit(do_not_specialize=["tokens", "heads"])
def class_logits_kernel(
    q,
    k,
    row,
    column,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row[j] = scale k_j q_0 and column[i] = scale q_i k_0 for BLOCK tokens of one head."""
    tiles = tl.cdiv(tokens, BLOCK)
    head = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = rows < tokens
    q = head_start(q, head, heads, q_batch, q_head)
    k = head_start(k, head, heads, k_batch, k_head)
    line = head.to(tl.int64) * tokens + rows
    class_low, class_high = load_vector(q, D, LOW, HIGH)
    low, high = load_tile(k, rows, k_row, inside, D, LOW, HIGH, True)
    tl.store(row + line, multiply_vector(low, high, class_low, class_high, HIGH) * scale, mask=inside)
    class_low, class_high = load_vector(k, D, LOW, HIGH)
    low, high = load_tile(q, rows, q_row, inside, D, LOW, HIGH, True)
    tl.store(column + line, multiply_vector(low, high, class_low, class_high, HIGH) * scale, mask=inside)


@triton.jit
def sum_of_softmaxes(lines, offsets, inside, counted):
    """Softmax of each line of logits (HEADS, BLOCK) over its tokens inside, summed over the counted lines: (BLOCK,)."""
    logits = tl.load(lines + offsets, mask=inside[None, :], other=float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.sum(tl.where(counted[:, None], weights / tl.sum(weights, 1)[:, None], 0.0), 0)


@triton.jit(do_not_specialize=["tokens", "heads", "num_select", "first_candidate"])
def select_kernel(
    row,
    column,
    score,
    index,
    tokens,
    heads,
    num_select,
    first_candidate,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
):
    """One image: BLOCK >= tokens scores, the TOP >= num_select largest of them in order."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < tokens
    cls_attention = tl.zeros((BLOCK,), tl.float32)
    contribution = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        offsets = (image * heads + tl.minimum(head, heads - 1)[:, None]) * tokens + token[None, :]
        cls_attention += sum_of_softmaxes(row, offsets, inside, head < heads)
        contribution += sum_of_softmaxes(column, offsets, inside, head < heads)
    value = (cls_attention / heads) * (contribution / heads)
    tl.store(score + image * tokens + token, value, mask=inside)
    rank = tl.where(value == value, value.to(tl.int32, bitcast=True), -1)  # scores are >= 0: their bits order; NaN last
    rank = tl.where(inside & (token >= first_candidate), rank, -2)
    key = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)  # unique, lower index first among equals
    top = 0x7FFFFFFF - (tl.topk(key, TOP) & 0x7FFFFFFF)
    place = tl.arange(0, TOP)
    tl.store(index + image * num_select + place, top, mask=place < num_select)
