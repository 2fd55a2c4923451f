"""maws_attention backward in Triton: dq, dk and dv without the map, without atomics.

What: the gradient of `out` with respect to q, k, v, written into given tensors (views of one packed gradient as well).
How: two launches (three in fp32). The first walks a tile of queries over the keys and makes dq; as it holds the tile's
    `out` and its gradient anyway, it also makes delta = rowsum(out do), which no other pass has to read them for. The
    second walks a tile of keys over the queries and makes dk and dv. The tiles' probabilities are recomputed from lse.
    Each element is written by one program that adds in a fixed order, so runs are equal to the bit. As in the forward,
    the class token is a vector beside the tiles: a tile's sum starts from it, one more program per head makes its own
    row of dq (first launch) or of dk and dv (second), and the patches need no mask.
Memory: one fp32 array (B, H, N), delta. The map exists only as tiles in registers.
Limits: as the forward. In fp16 the gradient of the logits is rounded before the scale, as in FlashAttention: it
    overflows 1/scale times earlier than dq and dk do, which a loss scale must leave room for (GradScaler finds it).
    Probabilities come from lse in fp32, as in FlashAttention, so they lose accuracy with the size of the logits: from
    about 1e5 on, and their bound of 1 past 1e7.
Source: FFVT (arXiv 2107.02341) section 3.2; FlashAttention-2 (arXiv 2307.08691), algorithm 2, split in two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.tiles_triton import (
    LOG2_E,
    MAX_EXTENT,
    add,
    add_dot,
    contiguous_head,
    dot_row,
    dot_rows,
    dot_transposed,
    extent,
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

# What each launch of the second kernel leaves out, by element size; in fp32 dk and dv at once spill registers.
KEY_LAUNCHES = {2: (None,), 4: ("dv", "dk")}


def maws_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_max: Tensor, scale: float,
    grads: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """The gradient of `out` written into grads = (dq, dk, dv), each (B, N, H, D); row_max holds zeros."""
    B, N, H, D = q.shape
    if not B:
        return
    if extent(grad_out) > MAX_EXTENT:
        grad_out = grad_out.contiguous()
    out = out.contiguous()
    delta = torch.empty_like(lse)
    inputs = [strided(tensor) for tensor in (q, k, v, grad_out)]
    dq, dk, dv = (strided(grad) for grad in grads)

    def launch(kernel: triton.JITFunction, name: str, *others: Any) -> None:
        config = tuning.attention_config(name, tuning.architecture(q.device), q.element_size(), D)
        kernel[config.grid(N, B * H)](
            *(*inputs, *others, N, H, scale, scale * LOG2_E.value, D), **config.constants, **config.options
        )

    with torch.cuda.device_of(q):  # Triton launches on the current device
        launch(query_gradient_kernel, "query_gradient", out, lse, delta, dq)
        for unwanted in KEY_LAUNCHES[q.element_size()]:
            wanted = (None if name == unwanted else grad for name, grad in (("dk", dk), ("dv", dv)))
            launch(key_gradient_kernel, "key_gradient", lse, delta, *wanted)


@triton.jit(do_not_specialize=["N", "H"])
def query_gradient_kernel(
    q, k, v, do, out_ptr, lse_ptr, delta_ptr, dq, N, H, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of patch queries of one head; the last program of a head makes its class query's."""
    tiles = tl.cdiv(N - 1, BLOCK_M)
    bh, tile = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    q, k, v, do = head_of(q, bh, H), head_of(k, bh, H), head_of(v, bh, H), head_of(do, bh, H)
    out, dq = contiguous_head(out_ptr, bh, N, H, D), head_of(dq, bh, H)
    lse_ptr += bh.to(tl.int64) * N
    delta_ptr += bh.to(tl.int64) * N
    if tile == tiles:
        do_class = load_row(do, D)
        delta = dot_rows(load_row(out, D), do_class)
        tl.store(delta_ptr, delta)
        acc, _ = class_gradient(k, v, q, do, tl.load(lse_ptr), delta, N, scale_log2, D, BLOCK_N, True)
        store_row(dq, scaled(acc, scale), D)
    if tile < tiles:
        offs_m = 1 + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query_tile(q, k, v, do, out, lse_ptr, delta_ptr, dq, offs_m, N, scale, scale_log2, D, BLOCK_N, TAIL)


@triton.jit
def query_tile(
    q_head, k_head, v_head, do_head, out_head, lse_ptr, delta_ptr, dq_head, offs_m, N, scale, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq and delta of the queries offs_m."""
    mask_m = offs_m < N
    q = load_tile(q_head, offs_m, mask_m, D)
    do = load_tile(do_head, offs_m, mask_m, D)
    delta = dot_rows(load_tile(out_head, offs_m, mask_m, D), do)
    tl.store(delta_ptr + offs_m, delta, mask=mask_m)
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))  # infinite: probabilities of zero
    k_class = load_row(k_head, D)
    _, ds = class_weights(q, k_class, do, load_row(v_head, D), lse, delta, scale_log2)
    dq = outer(ds, k_class)
    tail = 1 + (N - 1) // BLOCK_N * BLOCK_N
    for start in range(1, tail, BLOCK_N):
        dq = add_keys(dq, q, do, k_head, v_head, start, N, lse, delta, scale_log2, D, BLOCK_N, False)
    for start in range(tail, N, TAIL):
        dq = add_keys(dq, q, do, k_head, v_head, start, N, lse, delta, scale_log2, D, TAIL, True)
    store_tile(dq_head, offs_m, mask_m, scaled(dq, scale), D)


@triton.jit
def add_keys(
    dq, q, do, k_head, v_head, start, N, lse, delta, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale of a tile of queries, with what the keys [start, start + BLOCK) add."""
    offs_n = start + tl.arange(0, BLOCK)
    mask_n = offs_n < N if MASKED else None
    k = load_tile(k_head, offs_n, mask_n, D)
    s = dot_transposed(q, k)  # (BLOCK_M, BLOCK)
    p = tl.exp2(s * scale_log2 - (lse * LOG2_E)[:, None])
    if MASKED:
        p = tl.where(mask_n[None, :], p, 0.0)
    dp = dot_transposed(do, load_tile(v_head, offs_n, mask_n, D))
    return add_dot(dq, p * (dp - delta[:, None]), k)


@triton.jit(do_not_specialize=["N", "H"])
def key_gradient_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, N, H, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dk, dv or both (None: not wanted) of a tile of patch keys of a head; its last program makes its class key's."""
    tiles = tl.cdiv(N - 1, BLOCK_N)
    bh, tile = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    q, k, v, do = head_of(q, bh, H), head_of(k, bh, H), head_of(v, bh, H), head_of(do, bh, H)
    if dk is not None:
        dk = head_of(dk, bh, H)
    if dv is not None:
        dv = head_of(dv, bh, H)
    lse_ptr += bh.to(tl.int64) * N
    delta_ptr += bh.to(tl.int64) * N
    if tile == tiles:
        dk_class, dv_class = class_gradient(q, do, k, v, lse_ptr, delta_ptr, N, scale_log2, D, BLOCK_M, False)
        if dk is not None:
            store_row(dk, scaled(dk_class, scale), D)
        if dv is not None:
            store_row(dv, dv_class, D)
    if tile < tiles:
        offs_n = 1 + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key_tile(q, k, v, do, lse_ptr, delta_ptr, dk, dv, offs_n, N, scale, scale_log2, D, BLOCK_M, TAIL)


@triton.jit
def key_tile(
    q_head, k_head, v_head, do_head, lse_ptr, delta_ptr, dk_head, dv_head, offs_n, N, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """What is wanted of dk and dv of the keys offs_n."""
    mask_n = offs_n < N
    k = load_tile(k_head, offs_n, mask_n, D)
    v = load_tile(v_head, offs_n, mask_n, D)
    q_class, do_class = load_row(q_head, D), load_row(do_head, D)
    p, ds = class_weights(k, q_class, v, do_class, tl.load(lse_ptr), tl.load(delta_ptr), scale_log2)
    dk, dv = outer(ds, q_class), outer(p, do_class)
    WANT_DK: tl.constexpr = dk_head is not None
    WANT_DV: tl.constexpr = dv_head is not None
    tail = 1 + (N - 1) // BLOCK_M * BLOCK_M
    for start in range(1, tail, BLOCK_M):
        dk, dv = add_queries(
            dk, dv, k, v, q_head, do_head, start, N, lse_ptr, delta_ptr, scale_log2, D, BLOCK_M, False, WANT_DK, WANT_DV
        )
    for start in range(tail, N, TAIL):
        dk, dv = add_queries(
            dk, dv, k, v, q_head, do_head, start, N, lse_ptr, delta_ptr, scale_log2, D, TAIL, True, WANT_DK, WANT_DV
        )
    if WANT_DK:
        store_tile(dk_head, offs_n, mask_n, scaled(dk, scale), D)
    if WANT_DV:
        store_tile(dv_head, offs_n, mask_n, dv, D)


@triton.jit
def add_queries(
    dk, dv, k, v, q_head, do_head, start, N, lse_ptr, delta_ptr, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of a tile of keys, with what the queries [start, start + BLOCK) add to those wanted."""
    offs_m = start + tl.arange(0, BLOCK)
    mask_m = offs_m < N if MASKED else None
    q = load_tile(q_head, offs_m, mask_m, D)
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))  # infinite: probabilities of zero
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    s = dot_transposed(k, q)  # (BLOCK_N, BLOCK)
    p = tl.exp2(s * scale_log2 - (lse * LOG2_E)[None, :])
    if MASKED:
        p = tl.where(mask_m[None, :], p, 0.0)  # a query of zeros times an infinite key is NaN
    do = load_tile(do_head, offs_m, mask_m, D)
    if WANT_DV:
        dv = add_dot(dv, p, do)
    if WANT_DK:
        dp = dot_transposed(v, do)
        dk = add_dot(dk, p * (dp - delta[None, :]), q)
    return dk, dv


@triton.jit
def class_weights(a, a_class, b, b_class, lse, delta, scale_log2):
    """p and ds between the class token and each row of a tile, (R,); the class token is query or key.

    a and b are tiles and a_class, b_class rows of the class token: (k, v) of keys, (q, do) of queries. lse and delta
    are those of the queries: one number where the class token is the query, else one per row.
    """
    p = tl.exp2(dot_row(a, a_class) * scale_log2 - lse * LOG2_E)
    return p, p * (dot_row(b, b_class) - delta)


@triton.jit
def class_gradient(
    a_head, b_head, a_class, b_class, lse, delta, N, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, IS_QUERY: tl.constexpr,
):  # fmt: skip
    """The class token against all N tokens: dq / scale as a query, or dk / scale and dv as a key, in fp32.

    The rows of the heads a and b are walked, a_class and b_class hold the class token's (see `class_weights`). As a
    query, lse and delta are its own numbers; as a key, pointers to those of all queries.
    """
    a_class, b_class = load_row(a_class, D), load_row(b_class, D)
    da, db = zeros_like(a_class), zeros_like(b_class)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < N
        a = load_tile(a_head, offs, mask, D)
        b = load_tile(b_head, offs, mask, D)
        if IS_QUERY:
            p, ds = class_weights(a, a_class, b, b_class, lse, delta, scale_log2)
        else:
            tile_lse = tl.load(lse + offs, mask=mask, other=float("inf"))
            tile_delta = tl.load(delta + offs, mask=mask, other=0.0)
            p, ds = class_weights(a, a_class, b, b_class, tile_lse, tile_delta, scale_log2)
        da = add(da, weighted_rows(tl.where(mask, ds, 0.0), a))
        if not IS_QUERY:
            db = add(db, weighted_rows(tl.where(mask, p, 0.0), b))
    return da, db
