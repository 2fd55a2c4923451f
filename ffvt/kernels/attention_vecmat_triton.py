"""attention_vecmat in Triton: a row vector times the softmax map of every head, without the map.

What: y_j = sum_i w_i exp(s_ij - lse_i), (B, H, N) fp32, of weights and lse (B, H, N) fp32 and q, k (B, N, H, D). One
    launch; where lse is not given, the forward kernel of `maws_attention` makes it first, without values.
How: a program owns a tile of patch keys and walks the queries. Its sum starts from the class query, as a vector; the
    N-1 patch queries follow in whole blocks without a mask, what is left in masked steps of TAIL; one more program per
    head makes the class key's number. Each element is written by one program that adds in a fixed order, without
    atomics, so runs are equal to the bit. Exponentials are of base 2, sums in fp32. The queries are the rows of a
    step's tile, and all steps add up in one array of that shape: a thread then holds the weights of two queries, and no
    step ends in a reduction. In 16 bits at D = 64 that is 180 instructions a step on sm_90 and 195 on sm_80; a sum
    after each step makes it 361 and 279, and keys as rows 225 and 210, or with a sum after each step 245 and 249.
Memory: nothing beyond the result; three fp32 arrays (B, H, N) where lse is not given.
Limits: as `maws_attention_triton`. A probability comes from lse in fp32, so it loses accuracy with the size of the
    logits. The weights may be anything: tokens that do not exist are left out, not multiplied by zero.
Source: TransFG (arXiv 2103.07976) section 3.3, whose product of maps it replaces; FlashAttention-2 (arXiv 2307.08691)
    for probabilities from lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.maws_attention_triton import attend
from ffvt.kernels.tiles_triton import LOG2_E, dot_row, dot_transposed, head_of, load_row, load_tile, strided


def attention_vecmat_forward(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    """weights (B, H, N) fp32 times the map of q, k (B, N, H, D): (B, H, N) fp32. lse (B, H, N) fp32, or None."""
    B, N, H, D = q.shape
    product = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    config = tuning.attention_config("vecmat", tuning.architecture(q.device), q.element_size(), D)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if lse is None:
            _, lse, _, _ = attend(q, k, None, scale)
        if B:
            attention_vecmat_kernel[config.grid(N, B * H)](
                *(weights, strided(q), strided(k), lse, product, N, H, scale * LOG2_E.value, D),
                **config.constants,
                **config.options,
            )
    return product


@triton.jit(do_not_specialize=["N", "H"])
def attention_vecmat_kernel(
    weight_ptr, q, k, lse_ptr, product_ptr, N, H, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per tile of patch keys of one head; the last program of a head serves its class key."""
    tiles = tl.cdiv(N - 1, BLOCK_N)
    bh, tile = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    q, k = head_of(q, bh, H), head_of(k, bh, H)
    line = bh.to(tl.int64) * N
    weight_ptr += line
    lse_ptr += line
    product_ptr += line
    if tile == tiles:
        class_key(weight_ptr, q, k, lse_ptr, product_ptr, N, scale_log2, D, BLOCK_M)
    if tile < tiles:
        offs_n = 1 + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key_tile(weight_ptr, q, k, lse_ptr, product_ptr, offs_n, N, scale_log2, D, BLOCK_M, TAIL)


@triton.jit
def key_tile(
    weight_ptr, q_head, k_head, lse_ptr, product_ptr, offs_n, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The product's numbers of the keys offs_n."""
    mask_n = offs_n < N
    k = load_tile(k_head, offs_n, mask_n, D)
    s_class = dot_row(k, load_row(q_head, D))  # (BLOCK_N,)
    total = weighted(tl.load(weight_ptr), s_class, tl.load(lse_ptr), scale_log2)
    blocks = tl.zeros((BLOCK_M, offs_n.shape[0]), tl.float32)
    tail = 1 + (N - 1) // BLOCK_M * BLOCK_M
    for start in range(1, tail, BLOCK_M):
        blocks += of_queries(weight_ptr, q_head, k, lse_ptr, start, N, scale_log2, D, BLOCK_M, False)
    total += tl.sum(blocks, 0)
    for start in range(tail, N, TAIL):
        total += tl.sum(of_queries(weight_ptr, q_head, k, lse_ptr, start, N, scale_log2, D, TAIL, True), 0)
    tl.store(product_ptr + offs_n, total, mask=mask_n)


@triton.jit
def of_queries(
    weight_ptr, q_head, k, lse_ptr, start, N, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the queries [start, start + BLOCK) add to the keys of a tile, one by one: (BLOCK, BLOCK_N)."""
    offs_m = start + tl.arange(0, BLOCK)
    mask_m = offs_m < N if MASKED else None
    s = dot_transposed(load_tile(q_head, offs_m, mask_m, D), k)
    weight, lse = tl.load(weight_ptr + offs_m, mask=mask_m), tl.load(lse_ptr + offs_m, mask=mask_m)
    terms = weighted(weight[:, None], s, lse[:, None], scale_log2)
    if MASKED:
        terms = tl.where(mask_m[:, None], terms, 0.0)
    return terms


@triton.jit
def class_key(
    weight_ptr, q_head, k_head, lse_ptr, product_ptr, N, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The product's number of the class key, without matrix units."""
    k = load_row(k_head, D)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < N
        s = dot_row(load_tile(q_head, offs, mask, D), k)  # (BLOCK,)
        terms = weighted(tl.load(weight_ptr + offs, mask=mask), s, tl.load(lse_ptr + offs, mask=mask), scale_log2)
        total += tl.where(mask, terms, 0.0)
    tl.store(product_ptr, tl.sum(total, 0))


@triton.jit
def weighted(weight, s, lse, scale_log2):
    """Weights times the probabilities of products s."""
    return weight * tl.exp2(s * scale_log2 - lse * LOG2_E)
