"""maws_attention forward in Triton: attention that leaves the class token's row and column of logits behind.

What: out (B, N, H, D), lse, and the logits S[0, :] and S[:, 0] of every head, (B, H, N) fp32; then the selection
    kernel of `maws_select_triton` picks from them. Two launches.
How: FlashAttention-2's online softmax in base 2 with fp32 sums. Two forms, a column of the table in `tuning`:
    class split: each tile of patch queries starts its softmax from the class key (maximum s_i0, sum 1, output v_0),
        which gives column 0 for free; the N-1 patch keys follow in whole blocks without a mask, what is left in masked
        steps of TAIL; one more program per head makes the class token's own row.
    tail mask: class token and patches alike; the last keys are masked, the first tile of queries stores row 0.
Memory: three fp32 arrays (B, H, N), lse included. The map exists only as tiles in registers.
Limits: D up to 128; fp16, bf16, fp32 (not rounded to TF32); one image of q, k, v or out within 2^31 elements.
Source: FFVT (arXiv 2107.02341) section 3.2; FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.maws_select_triton import pick
from ffvt.kernels.tiles_triton import (
    LN_2,
    LOG2_E,
    add_product,
    head_blocks,
    head_start,
    load_tile,
    load_vector,
    multiply_transposed,
    multiply_vector,
    outer,
    store_tile,
    store_vector,
    weighted_rows,
    zero_tile,
)


def maws_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, N, H, D), index (B, K) int64, score (B, N) fp32, lse (B, H, N) fp32."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, row, column = (torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device) for _ in range(3))
    config = tuning.attention("forward", tuning.architecture(q.device), q.element_size(), head_dim)
    low, high = head_blocks(head_dim)
    if batch:
        attention_forward_kernel[config.grid(tokens, batch * heads)](
            *(q, k, v, out, lse, row, column),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(tokens, heads, abs(scale), abs(scale) * LOG2_E.value),
            D=head_dim,
            LOW=low,
            HIGH=high,
            NEGATIVE=scale < 0,
            **config.constants,
            **config.options,
        )
    index, score = pick(row, column, num_select, first_candidate)
    return out, index, score, lse


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    row,
    column,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    tokens,
    heads,
    scale,  # of the logits, without its sign
    scale_2,  # the same for logits in base 2, from the host: one rounding less
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NEGATIVE: tl.constexpr,  # the sign of the scale: q takes it over, as the running maximum needs a positive scale
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per tile of queries of one head; with CLASS_SPLIT the last program of a head makes the class row."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    tiles = tl.cdiv(tokens - first, BLOCK_Q)
    head = tl.program_id(0) // (tiles + first)
    tile = tl.program_id(0) % (tiles + first)
    q = head_start(q, head, heads, q_batch, q_head)
    k = head_start(k, head, heads, k_batch, k_head)
    v = head_start(v, head, heads, v_batch, v_head)
    out = head_start(out, head, heads, tokens * heads * D, D)
    line = head.to(tl.int64) * tokens
    if CLASS_SPLIT:
        if tile == tiles:
            # fmt: off
            class_row(
                q, k, v, out, lse + line, row + line, column + line, k_row, v_row, tokens, scale, scale_2,
                D, LOW, HIGH, NEGATIVE, BLOCK_K,
            )
            # fmt: on
    if tile < tiles:
        # fmt: off
        query_tile(
            q, k, v, out, lse + line, row + line, column + line, q_row, k_row, v_row, heads * D, tile, tokens, scale,
            scale_2, D, LOW, HIGH, NEGATIVE, CLASS_SPLIT, BLOCK_Q, BLOCK_K, TAIL,
        )
        # fmt: on


@triton.jit
def query_tile(
    q,
    k,
    v,
    out,
    lse,
    row,
    column,
    q_row,
    k_row,
    v_row,
    out_row,
    tile,
    tokens,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """BLOCK_Q rows of out, lse and column; without CLASS_SPLIT the first tile also stores row."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    queries = first + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = queries < tokens
    q_low, q_high = load_tile(q, queries, q_row, inside, D, LOW, HIGH, True)
    if NEGATIVE:
        q_low, q_high = -q_low, -q_high
    class_low, class_high = load_vector(k, D, LOW, HIGH)
    class_logits = multiply_vector(q_low, q_high, class_low, class_high, HIGH)  # (BLOCK_Q,)
    tl.store(column + queries, class_logits * scale, mask=inside)
    if CLASS_SPLIT:
        maximum = class_logits * scale_2
        total = tl.full((BLOCK_Q,), 1.0, tl.float32)
        value_low, value_high = load_vector(v, D, LOW, HIGH)
        out_low, out_high = outer(total, value_low, value_high, HIGH)
    else:
        maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        out_low, out_high = zero_tile(BLOCK_Q, LOW, HIGH)
    tail = first + (tokens - first) // BLOCK_K * BLOCK_K
    store_row = tile == 0
    for start in range(first, tail, BLOCK_K):
        # fmt: off
        maximum, total, out_low, out_high = attend(
            q_low, q_high, k, v, row, k_row, v_row, start, tokens, store_row, scale, scale_2, maximum, total, out_low,
            out_high, D, LOW, HIGH, CLASS_SPLIT, BLOCK_K, False,
        )
        # fmt: on
    for start in range(tail, tokens, TAIL):
        # fmt: off
        maximum, total, out_low, out_high = attend(
            q_low, q_high, k, v, row, k_row, v_row, start, tokens, store_row, scale, scale_2, maximum, total, out_low,
            out_high, D, LOW, HIGH, CLASS_SPLIT, TAIL, True,
        )
        # fmt: on
    tl.store(lse + queries, (maximum + tl.log2(total)) * LN_2, mask=inside)
    share = (1.0 / total)[:, None]
    store_tile(out, queries, out_row, inside, out_low * share, out_high * share, D, LOW, HIGH)


@triton.jit
def finite(maximum):
    """The maximum to subtract: 0 while all logits are -inf, as -inf less -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def attend(
    q_low,
    q_high,
    k,
    v,
    row,
    k_row,
    v_row,
    start,
    tokens,
    store_row,
    scale,
    scale_2,
    maximum,
    total,
    out_low,
    out_high,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax, over the keys [start, start + BLOCK)."""
    keys = start + tl.arange(0, BLOCK)
    inside = keys < tokens
    k_low, k_high = load_tile(k, keys, k_row, inside, D, LOW, HIGH, MASKED)
    logits = multiply_transposed(q_low, q_high, k_low, k_high, HIGH)  # (BLOCK_Q, BLOCK)
    if not CLASS_SPLIT:
        if store_row:
            is_first = tl.arange(0, logits.shape[0])[:, None] == 0
            tl.store(row + keys, tl.sum(tl.where(is_first, logits, 0.0), 0) * scale, mask=inside)
    if MASKED:
        logits = tl.where(inside[None, :], logits * scale_2, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shift = finite(new_maximum)
        probs = tl.exp2(logits - shift[:, None])
    else:
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * scale_2)
        shift = finite(new_maximum)
        probs = tl.exp2(logits * scale_2 - shift[:, None])
    shrink = tl.exp2(maximum - shift)
    total = total * shrink + tl.sum(probs, 1)
    out_low = out_low * shrink[:, None]
    if HIGH:
        out_high = out_high * shrink[:, None]
    v_low, v_high = load_tile(v, keys, v_row, inside, D, LOW, HIGH, MASKED)
    out_low, out_high = add_product(probs, v_low, v_high, out_low, out_high, HIGH)
    return new_maximum, total, out_low, out_high


@triton.jit
def class_row(
    q,
    k,
    v,
    out,
    lse,
    row,
    column,
    k_row,
    v_row,
    tokens,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row 0 of out and lse, all of row, and column[0]: the class query against every key, without matrix units."""
    q_low, q_high = load_vector(q, D, LOW, HIGH)
    if NEGATIVE:
        q_low, q_high = -q_low, -q_high
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    out_low = tl.zeros((LOW,), tl.float32)
    out_high = tl.zeros((HIGH if HIGH else LOW,), tl.float32)
    for start in range(0, tokens, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = keys < tokens
        k_low, k_high = load_tile(k, keys, k_row, inside, D, LOW, HIGH, True)
        logits = multiply_vector(k_low, k_high, q_low, q_high, HIGH)  # (BLOCK,)
        tl.store(row + keys, logits * scale, mask=inside)
        tl.store(column + keys, logits * scale, mask=keys == 0)
        logits = tl.where(inside, logits * scale_2, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        shift = finite(new_maximum)
        probs = tl.exp2(logits - shift)
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(probs, 0)
        v_low, v_high = load_tile(v, keys, v_row, inside, D, LOW, HIGH, True)
        added_low, added_high = weighted_rows(probs, v_low, v_high, HIGH)
        out_low = out_low * shrink + added_low
        if HIGH:
            out_high = out_high * shrink + added_high
        maximum = new_maximum
    tl.store(lse, (maximum + tl.log2(total)) * LN_2)
    store_vector(out, out_low / total, out_high / total, D, LOW, HIGH)
