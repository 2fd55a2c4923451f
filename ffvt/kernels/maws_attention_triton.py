"""maws_attention forward in Triton: attention that leaves the class token's row and column of logits behind.

What: out (B, N, H, D), lse, and the logits S[0, :] and S[:, 0] of every head, (B, H, N) fp32; then the selection
    kernel of `maws_select_triton` picks from them. Two launches.
How: FlashAttention-2's online softmax in base 2 with fp32 sums, with the class token split off. Each tile of patch
    queries starts its softmax from the class key (m = s_i0, l = 1, acc = v_0), which gives column 0 for free; the N-1
    patch keys follow in whole blocks without a mask, what is left in masked steps of TAIL; one more program per head
    makes the class token's own row.
Memory: three fp32 arrays (B, H, N), lse included. The map exists only as tiles in registers.
Limits: D up to 128; fp16, bf16, fp32 (not rounded to TF32); scale > 0; one image of q, k, v or out within 2^31
    elements.
Source: FFVT (arXiv 2107.02341) section 3.2; FlashAttention-2 (arXiv 2307.08691).
"""
# ruff: noqa: E741 - l is the sum of the softmax in every paper

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
    add,
    add_dot,
    contiguous_head,
    dot_row,
    dot_transposed,
    head_of,
    load_row,
    load_tile,
    outer,
    scaled,
    store_row,
    store_tile,
    strided,
    weighted_rows,
    zeros_like,
)


def maws_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (B, N, H, D), index (B, K) int64, score (B, N) fp32, lse (B, H, N) fp32, and the zeros that lse lacks."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse, row, col = attend(q, k, v, scale)
        index, score = pick(row, col, num_select, first_candidate)
    return out, index, score, lse, torch.zeros_like(lse)


def attend(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """out (B, N, H, D), lse and the class token's row and column of logits, (B, H, N) fp32; without v no out.

    Launches on the current device.
    """
    B, N, H, D = q.shape
    out = None if v is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, row, col = (torch.empty(B, H, N, dtype=torch.float32, device=q.device) for _ in range(3))
    kernel = "log_sum_exp" if v is None else "forward"
    config = tuning.attention_config(kernel, tuning.architecture(q.device), q.element_size(), D)
    values = None if v is None else strided(v)
    if B:
        attention_forward_kernel[config.grid(N, B * H)](
            *(strided(q), strided(k), values, out, lse, row, col, N, H, scale, scale * LOG2_E.value, D),
            **config.constants,
            **config.options,
        )
    return out, lse, row, col


# scale_log2 is scale * log2(e) from the host: one rounding less.
@triton.jit(do_not_specialize=["N", "H"])
def attention_forward_kernel(
    q, k, v, out_ptr, lse_ptr, row_ptr, col_ptr, N, H, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per tile of patch queries of one head; the last program of a head makes the class row.

    v and out_ptr of None: the statistics alone.
    """
    tiles = tl.cdiv(N - 1, BLOCK_M)
    bh, tile = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    q, k, out = head_of(q, bh, H), head_of(k, bh, H), None
    if v is not None:
        v, out = head_of(v, bh, H), contiguous_head(out_ptr, bh, N, H, D)
    line = bh.to(tl.int64) * N
    if tile == tiles:
        class_row(q, k, v, out, lse_ptr + line, row_ptr + line, col_ptr + line, N, scale, scale_log2, D, BLOCK_N)
    if tile < tiles:
        offs_m = 1 + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query_tile(q, k, v, out, lse_ptr + line, col_ptr + line, offs_m, N, scale, scale_log2, D, BLOCK_N, TAIL)


@triton.jit
def query_tile(
    q_head, k_head, v_head, out_head, lse_ptr, col_ptr, offs_m, N, scale, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """out, lse and column 0 of the queries offs_m."""
    mask_m = offs_m < N
    q = load_tile(q_head, offs_m, mask_m, D)
    s_class = dot_row(q, load_row(k_head, D))  # (BLOCK_M,)
    tl.store(col_ptr + offs_m, s_class * scale, mask=mask_m)
    m = s_class * scale_log2
    l = tl.full(m.shape, 1.0, tl.float32)
    acc = ()
    if v_head is not None:
        acc = outer(l, load_row(v_head, D))
    tail = 1 + (N - 1) // BLOCK_N * BLOCK_N
    for start in range(1, tail, BLOCK_N):
        m, l, acc = softmax_step(q, k_head, v_head, start, N, m, l, acc, scale_log2, D, BLOCK_N, False)
    for start in range(tail, N, TAIL):
        m, l, acc = softmax_step(q, k_head, v_head, start, N, m, l, acc, scale_log2, D, TAIL, True)
    tl.store(lse_ptr + offs_m, (m + tl.log2(l)) * LN_2, mask=mask_m)
    if out_head is not None:
        store_tile(out_head, offs_m, mask_m, scaled(acc, (1.0 / l)[:, None]), D)


@triton.jit
def finite(m):
    """The maximum to subtract: 0 while all logits are -inf, as -inf less -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def softmax_step(
    q, k_head, v_head, start, N, m, l, acc, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """m, l, acc after the keys [start, start + BLOCK)."""
    offs_n = start + tl.arange(0, BLOCK)
    mask_n = offs_n < N if MASKED else None
    s = dot_transposed(q, load_tile(k_head, offs_n, mask_n, D))  # (BLOCK_M, BLOCK)
    if MASKED:
        s = tl.where(mask_n[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = finite(m_new)
        p = tl.exp2(s - shift[:, None])
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        shift = finite(m_new)
        p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    if v_head is not None:
        acc = scaled(acc, alpha[:, None])
        acc = add_dot(acc, p, load_tile(v_head, offs_n, mask_n, D))
    return m_new, l, acc


@triton.jit
def class_row(
    q_head, k_head, v_head, out_head, lse_ptr, row_ptr, col_ptr, N, scale, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row 0 of out and lse, all of row, and col[0]: the class query against every key, without matrix units."""
    q = load_row(q_head, D)
    m = tl.full((), float("-inf"), tl.float32)
    l = tl.zeros((), tl.float32)
    acc = zeros_like(q)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        s = dot_row(load_tile(k_head, offs_n, mask_n, D), q)  # (BLOCK,)
        tl.store(row_ptr + offs_n, s * scale, mask=mask_n)
        tl.store(col_ptr + offs_n, s * scale, mask=offs_n == 0)
        s = tl.where(mask_n, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        shift = finite(m_new)
        p = tl.exp2(s - shift)
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 0)
        if v_head is not None:
            added = weighted_rows(p, load_tile(v_head, offs_n, mask_n, D))
            acc = add(scaled(acc, alpha), added)
        m = m_new
    tl.store(lse_ptr, (m + tl.log2(l)) * LN_2)
    if out_head is not None:
        store_row(out_head, [block / l for block in acc], D)
