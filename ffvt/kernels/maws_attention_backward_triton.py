"""maws_attention backward in Triton: dq, dk and dv without the map, without atomics.

What: the gradient of `out` with respect to q, k, v, written into given tensors (views of one packed gradient as well).
How: two launches (three in fp32). The first walks a tile of queries over the keys and makes dq; as it holds the tile's
    `out` and its gradient anyway, it also makes delta = rowsum(out grad_out), which no other pass has to read them
    for. The second walks a tile of keys over the queries and makes dk and dv. The tiles' probabilities are recomputed
    from lse. Each element is written by one program that adds in a fixed order, so runs are equal to the bit.
    class split: as in the forward, the class token is a vector beside the tiles. A tile's sum starts from it, one more
    program per head makes its own line of dq (first launch) or of dk and dv (second), and the patches need no mask.
Memory: one fp32 array (B, H, N), delta. The map exists only as tiles in registers.
Limits: as the forward. In fp16 the gradient of the logits is rounded before the scale, as in FlashAttention: it
    overflows 1/scale times earlier than dq and dk do, which a loss scale must leave room for (GradScaler finds it).
Source: FFVT (arXiv 2107.02341) section 3.2; FlashAttention-2 (arXiv 2307.08691), algorithm 2, split in two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.tiles_triton import (
    LOG2_E,
    MAX_EXTENT,
    add_product,
    extent,
    head_blocks,
    head_start,
    load_tile,
    load_vector,
    multiply_rows,
    multiply_transposed,
    multiply_vector,
    outer,
    store_tile,
    store_vector,
    weighted_rows,
    zero_tile,
)

WANTED = {  # dk and dv of one launch of the second kernel; in fp32 both at once spill registers
    False: ({"WANT_DK": True, "WANT_DV": True},),
    True: ({"WANT_DK": True, "WANT_DV": False}, {"WANT_DK": False, "WANT_DV": True}),
}


def maws_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The gradient of `out` written into grads = (dq, dk, dv), each (B, N, H, D)."""
    batch, tokens, heads, head_dim = q.shape
    if not batch:
        return
    if grad_out.stride(-1) != 1 or extent(grad_out) > MAX_EXTENT:  # that of a sum is broadcast
        grad_out = grad_out.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    low, high = head_blocks(head_dim)
    dq, dk, dv = grads
    arch = tuning.architecture(q.device)
    inputs = (q, k, v, grad_out)
    shape = {"D": head_dim, "LOW": low, "HIGH": high}

    def launch(kernel: triton.JITFunction, name: str, tensors: tuple, targets: tuple, **want: bool) -> None:
        config = tuning.attention(name, arch, q.element_size(), head_dim)
        strides = [stride for tensor in (*inputs, *targets) for stride in tensor.stride()[:3]]
        kernel[config.grid(tokens, batch * heads)](
            *(*inputs, *tensors, *targets, *strides),
            *(tokens, heads, scale, scale * LOG2_E.value),
            **shape,
            **want,
            **config.constants,
            **config.options,
        )

    launch(query_gradient_kernel, "query_gradient", (out, lse, delta), (dq,))
    for want in WANTED[q.dtype == torch.float32]:
        launch(key_gradient_kernel, "key_gradient", (lse, delta), (dk, dv), **want)


@triton.jit(do_not_specialize=["tokens", "heads"])
def query_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    out,
    lse,
    delta,
    dq,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
    dq_batch,
    dq_row,
    dq_head,
    tokens,
    heads,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dq and delta of one tile of queries of one head; with CLASS_SPLIT the last program of a head serves its class
    query."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    tiles = tl.cdiv(tokens - first, BLOCK_Q)
    head = tl.program_id(0) // (tiles + first)
    tile = tl.program_id(0) % (tiles + first)
    q = head_start(q, head, heads, q_batch, q_head)
    k = head_start(k, head, heads, k_batch, k_head)
    v = head_start(v, head, heads, v_batch, v_head)
    grad_out = head_start(grad_out, head, heads, grad_batch, grad_head)
    out = head_start(out, head, heads, tokens * heads * D, D)
    dq = head_start(dq, head, heads, dq_batch, dq_head)
    lse += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens
    if CLASS_SPLIT:
        if tile == tiles:
            grad_low, grad_high = load_vector(grad_out, D, LOW, HIGH)
            out_low, out_high = load_vector(out, D, LOW, HIGH)
            class_delta = tl.sum(out_low * grad_low, 0)
            if HIGH:
                class_delta += tl.sum(out_high * grad_high, 0)
            tl.store(delta, class_delta)
            # fmt: off
            dq_low, dq_high, _, _ = class_line(
                k, v, k_row, v_row, q, grad_out, tl.load(lse), class_delta, tokens, scale, scale_2, D, LOW, HIGH, True,
            BLOCK_K, )
            # fmt: on
            store_vector(dq, dq_low, dq_high, D, LOW, HIGH)
    if tile < tiles:
        # fmt: off
        query_tile_gradient(
            q, k, v, grad_out, out, lse, delta, dq, q_row, k_row, v_row, grad_row, heads * D, dq_row,
            first + tile * BLOCK_Q, tokens, scale, scale_2, D, LOW, HIGH, CLASS_SPLIT, BLOCK_Q, BLOCK_K, TAIL,
        )
        # fmt: on


@triton.jit
def query_tile_gradient(
    q,
    k,
    v,
    grad_out,
    out,
    lse,
    delta,
    dq,
    q_row,
    k_row,
    v_row,
    grad_row,
    out_row,
    dq_row,
    start_query,
    tokens,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """BLOCK_Q rows of dq and delta."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    queries = start_query + tl.arange(0, BLOCK_Q)
    inside = queries < tokens
    q_low, q_high = load_tile(q, queries, q_row, inside, D, LOW, HIGH, True)
    grad_low, grad_high = load_tile(grad_out, queries, grad_row, inside, D, LOW, HIGH, True)
    out_low, out_high = load_tile(out, queries, out_row, inside, D, LOW, HIGH, True)
    tile_delta = multiply_rows(out_low, out_high, grad_low, grad_high, HIGH)
    tl.store(delta + queries, tile_delta, mask=inside)
    tile_lse = tl.load(lse + queries, mask=inside, other=float("inf"))  # infinite: probabilities of zero
    if CLASS_SPLIT:
        k_low, k_high = load_vector(k, D, LOW, HIGH)
        v_low, v_high = load_vector(v, D, LOW, HIGH)
        # fmt: off
        _, d_logits = class_weights(
            q_low, q_high, k_low, k_high, grad_low, grad_high, v_low, v_high, tile_lse, tile_delta, scale_2, HIGH
        )
        # fmt: on
        dq_low, dq_high = outer(d_logits, k_low, k_high, HIGH)
    else:
        dq_low, dq_high = zero_tile(BLOCK_Q, LOW, HIGH)
    tail = first + (tokens - first) // BLOCK_K * BLOCK_K
    for start in range(first, tail, BLOCK_K):
        # fmt: off
        dq_low, dq_high = add_keys(
            q_low, q_high, grad_low, grad_high, k, v, k_row, v_row, start, tokens, tile_lse, tile_delta, scale_2,
            dq_low, dq_high, D, LOW, HIGH, BLOCK_K, False,
        )
        # fmt: on
    for start in range(tail, tokens, TAIL):
        # fmt: off
        dq_low, dq_high = add_keys(
            q_low, q_high, grad_low, grad_high, k, v, k_row, v_row, start, tokens, tile_lse, tile_delta, scale_2,
            dq_low, dq_high, D, LOW, HIGH, TAIL, True,
        )
        # fmt: on
    store_tile(dq, queries, dq_row, inside, dq_low * scale, dq_high * scale, D, LOW, HIGH)


@triton.jit
def add_keys(
    q_low,
    q_high,
    grad_low,
    grad_high,
    k,
    v,
    k_row,
    v_row,
    start,
    tokens,
    lse,
    delta,
    scale_2,
    dq_low,
    dq_high,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the keys [start, start + BLOCK) add to dq / scale of a tile of queries."""
    keys = start + tl.arange(0, BLOCK)
    inside = keys < tokens
    k_low, k_high = load_tile(k, keys, k_row, inside, D, LOW, HIGH, MASKED)
    logits = multiply_transposed(q_low, q_high, k_low, k_high, HIGH)  # (BLOCK_Q, BLOCK)
    probs = tl.exp2(logits * scale_2 - (lse * LOG2_E)[:, None])
    if MASKED:
        probs = tl.where(inside[None, :], probs, 0.0)
    v_low, v_high = load_tile(v, keys, v_row, inside, D, LOW, HIGH, MASKED)
    d_probs = multiply_transposed(grad_low, grad_high, v_low, v_high, HIGH)
    d_logits = probs * (d_probs - delta[:, None])
    return add_product(d_logits, k_low, k_high, dq_low, dq_high, HIGH)


@triton.jit(do_not_specialize=["tokens", "heads"])
def key_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
    dk_batch,
    dk_row,
    dk_head,
    dv_batch,
    dv_row,
    dv_head,
    tokens,
    heads,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
):
    """dk, dv or both of one tile of keys of one head; with CLASS_SPLIT the last program of a head serves its class
    key."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    tiles = tl.cdiv(tokens - first, BLOCK_K)
    head = tl.program_id(0) // (tiles + first)
    tile = tl.program_id(0) % (tiles + first)
    q = head_start(q, head, heads, q_batch, q_head)
    k = head_start(k, head, heads, k_batch, k_head)
    v = head_start(v, head, heads, v_batch, v_head)
    grad_out = head_start(grad_out, head, heads, grad_batch, grad_head)
    dk = head_start(dk, head, heads, dk_batch, dk_head)
    dv = head_start(dv, head, heads, dv_batch, dv_head)
    lse += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens
    if CLASS_SPLIT:
        if tile == tiles:
            # fmt: off
            dk_low, dk_high, dv_low, dv_high = class_line(
                q, grad_out, q_row, grad_row, k, v, lse, delta, tokens, scale, scale_2, D, LOW, HIGH, False, BLOCK_Q,
            )
            # fmt: on
            if WANT_DK:
                store_vector(dk, dk_low, dk_high, D, LOW, HIGH)
            if WANT_DV:
                store_vector(dv, dv_low, dv_high, D, LOW, HIGH)
    if tile < tiles:
        # fmt: off
        key_tile_gradient(
            q, k, v, grad_out, lse, delta, dk, dv, q_row, k_row, v_row, grad_row, dk_row, dv_row,
            first + tile * BLOCK_K, tokens, scale, scale_2, D, LOW, HIGH, CLASS_SPLIT, BLOCK_Q, BLOCK_K, TAIL, WANT_DK,
        WANT_DV, )
        # fmt: on


@triton.jit
def key_tile_gradient(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    q_row,
    k_row,
    v_row,
    grad_row,
    dk_row,
    dv_row,
    start_key,
    tokens,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CLASS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
):
    """BLOCK_K rows of what is wanted of dk and dv."""
    first: tl.constexpr = 1 if CLASS_SPLIT else 0
    keys = start_key + tl.arange(0, BLOCK_K)
    inside = keys < tokens
    k_low, k_high = load_tile(k, keys, k_row, inside, D, LOW, HIGH, True)
    v_low, v_high = load_tile(v, keys, v_row, inside, D, LOW, HIGH, True)
    if CLASS_SPLIT:
        q_low, q_high = load_vector(q, D, LOW, HIGH)
        grad_low, grad_high = load_vector(grad_out, D, LOW, HIGH)
        # fmt: off
        probs, d_logits = class_weights(
            k_low, k_high, q_low, q_high, v_low, v_high, grad_low, grad_high, tl.load(lse), tl.load(delta), scale_2,
            HIGH
        )
        # fmt: on
        dk_low, dk_high = outer(d_logits, q_low, q_high, HIGH)
        dv_low, dv_high = outer(probs, grad_low, grad_high, HIGH)
    else:
        dk_low, dk_high = zero_tile(BLOCK_K, LOW, HIGH)
        dv_low, dv_high = zero_tile(BLOCK_K, LOW, HIGH)
    tail = first + (tokens - first) // BLOCK_Q * BLOCK_Q
    for start in range(first, tail, BLOCK_Q):
        # fmt: off
        dk_low, dk_high, dv_low, dv_high = add_queries(
            k_low, k_high, v_low, v_high, q, grad_out, q_row, grad_row, start, tokens, lse, delta, scale_2,
            dk_low, dk_high, dv_low, dv_high, D, LOW, HIGH, WANT_DK, WANT_DV, BLOCK_Q, False,
        )
        # fmt: on
    for start in range(tail, tokens, TAIL):
        # fmt: off
        dk_low, dk_high, dv_low, dv_high = add_queries(
            k_low, k_high, v_low, v_high, q, grad_out, q_row, grad_row, start, tokens, lse, delta, scale_2,
            dk_low, dk_high, dv_low, dv_high, D, LOW, HIGH, WANT_DK, WANT_DV, TAIL, True,
        )
        # fmt: on
    if WANT_DK:
        store_tile(dk, keys, dk_row, inside, dk_low * scale, dk_high * scale, D, LOW, HIGH)
    if WANT_DV:
        store_tile(dv, keys, dv_row, inside, dv_low, dv_high, D, LOW, HIGH)


@triton.jit
def add_queries(
    k_low,
    k_high,
    v_low,
    v_high,
    q,
    grad_out,
    q_row,
    grad_row,
    start,
    tokens,
    lse,
    delta,
    scale_2,
    dk_low,
    dk_high,
    dv_low,
    dv_high,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the queries [start, start + BLOCK) add to dk / scale and dv of a tile of keys."""
    queries = start + tl.arange(0, BLOCK)
    inside = queries < tokens
    q_low, q_high = load_tile(q, queries, q_row, inside, D, LOW, HIGH, MASKED)
    if MASKED:
        tile_lse = tl.load(lse + queries, mask=inside, other=float("inf"))  # infinite: probabilities of zero
        tile_delta = tl.load(delta + queries, mask=inside, other=0.0)
    else:
        tile_lse = tl.load(lse + queries)
        tile_delta = tl.load(delta + queries)
    logits = multiply_transposed(k_low, k_high, q_low, q_high, HIGH)  # (BLOCK_K, BLOCK)
    probs = tl.exp2(logits * scale_2 - (tile_lse * LOG2_E)[None, :])
    if MASKED:
        probs = tl.where(inside[None, :], probs, 0.0)  # a query of zeros times an infinite key is NaN
    grad_low, grad_high = load_tile(grad_out, queries, grad_row, inside, D, LOW, HIGH, MASKED)
    if WANT_DV:
        dv_low, dv_high = add_product(probs, grad_low, grad_high, dv_low, dv_high, HIGH)
    if WANT_DK:
        d_probs = multiply_transposed(v_low, v_high, grad_low, grad_high, HIGH)
        d_logits = probs * (d_probs - tile_delta[None, :])
        dk_low, dk_high = add_product(d_logits, q_low, q_high, dk_low, dk_high, HIGH)
    return dk_low, dk_high, dv_low, dv_high


@triton.jit
def class_weights(
    a_low,
    a_high,
    a_class_low,
    a_class_high,
    b_low,
    b_high,
    b_class_low,
    b_class_high,
    lse,
    delta,
    scale_2,
    HIGH: tl.constexpr,
):
    """probs and d_logits between the class token and each row of a tile, (R,); the class token is query or key.

    a and b are the tile's and a_class, b_class the class token's: (k, v) of the keys, (q, grad_out) of the queries. lse
    and delta are those of the queries: one number where the class token is the query, else one per row.
    """
    logits = multiply_vector(a_low, a_high, a_class_low, a_class_high, HIGH)
    probs = tl.exp2(logits * scale_2 - lse * LOG2_E)
    d_probs = multiply_vector(b_low, b_high, b_class_low, b_class_high, HIGH)
    return probs, probs * (d_probs - delta)


@triton.jit
def class_line(
    a,
    b,
    a_row,
    b_row,
    a_class,
    b_class,
    lse,
    delta,
    tokens,
    scale,
    scale_2,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    IS_QUERY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The class token against all N tokens: its gradient as a query (dq) or as a key (dk, and dv last), in fp32.

    a and b are walked, a_class and b_class are the class token's (see `class_weights`). As a query, lse and delta are
    its own numbers; as a key, pointers to those of all queries.
    """
    a_class_low, a_class_high = load_vector(a_class, D, LOW, HIGH)
    b_class_low, b_class_high = load_vector(b_class, D, LOW, HIGH)
    da_low = tl.zeros((LOW,), tl.float32)
    da_high = tl.zeros((HIGH if HIGH else LOW,), tl.float32)
    db_low, db_high = da_low, da_high
    for start in range(0, tokens, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < tokens
        a_low, a_high = load_tile(a, rows, a_row, inside, D, LOW, HIGH, True)
        b_low, b_high = load_tile(b, rows, b_row, inside, D, LOW, HIGH, True)
        if IS_QUERY:
            line_lse = lse
            line_delta = delta
        else:
            line_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
            line_delta = tl.load(delta + rows, mask=inside, other=0.0)
        # fmt: off
        probs, d_logits = class_weights(
            a_low, a_high, a_class_low, a_class_high, b_low, b_high, b_class_low, b_class_high, line_lse, line_delta,
            scale_2, HIGH,
        )
        # fmt: on
        added_low, added_high = weighted_rows(tl.where(inside, d_logits, 0.0), a_low, a_high, HIGH)
        da_low += added_low
        if HIGH:
            da_high += added_high
        if not IS_QUERY:
            added_low, added_high = weighted_rows(tl.where(inside, probs, 0.0), b_low, b_high, HIGH)
            db_low += added_low
            if HIGH:
                db_high += added_high
    return da_low * scale, da_high * scale, db_low, db_high
