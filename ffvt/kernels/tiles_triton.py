"""Device functions that the attention kernels share: tiles of rows of one head, and their products.

A head dimension D that is no power of two is kept as two column blocks, LOW + HIGH >= D (80 = 64 + 16, 96 = 64 + 32),
so that nothing is padded to the next power of two; HIGH = 0 means that one block holds all of D. A tile is the pair
(low, high); with HIGH = 0 its second half is an alias that nothing reads.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 128
MAX_EXTENT = 2**31 - 1  # elements from the first to the last of one image: offsets within it are 32 bits wide
FP32_COLUMNS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of one image, and no fewer than the image holds."""
    spread = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]))
    return max(spread, math.prod(tensor.shape[1:]))


def head_blocks(head_dim: int) -> tuple[int, int]:
    """LOW and HIGH for a head dimension up to 128: powers of two from 16 on, with the least sum that holds it."""
    whole = max(16, triton.next_power_of_2(head_dim))
    halved = (whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2)))
    return halved if whole > 16 and sum(halved) < whole else (whole, 0)


@triton.jit
def head_start(base, head, heads, batch_stride, head_stride):
    """Pointer to token 0 of head `head` of all B * heads; in int64, as a batch can pass 2^31 elements."""
    return base + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride


@triton.jit
def load_columns(
    base, rows, row_stride, valid, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    columns = FROM + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * row_stride + columns[None, :]  # (R, WIDTH)
    if FROM + WIDTH > D:
        inside = columns[None, :] < D
        if MASKED:
            inside = inside & valid[:, None]
        block = tl.load(pointers, mask=inside, other=0.0)
    elif MASKED:
        block = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def load_tile(
    base, rows, row_stride, valid, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of one head as a tile; with MASKED, rows that are not valid read as zero."""
    low = load_columns(base, rows, row_stride, valid, D, 0, LOW, MASKED)
    high = low
    if HIGH:
        high = load_columns(base, rows, row_stride, valid, D, LOW, HIGH, MASKED)
    return low, high


@triton.jit
def load_vector(base, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """One row of one head, in fp32: the pair of (LOW,) and (HIGH,)."""
    columns = tl.arange(0, LOW)
    low = tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)
    high = low
    if HIGH:
        columns = LOW + tl.arange(0, HIGH)
        high = tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def store_columns(base, rows, row_stride, valid, block, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    inside = valid[:, None]
    if FROM + WIDTH > D:
        inside = inside & (columns[None, :] < D)
    tl.store(pointers, block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(base, rows, row_stride, valid, low, high, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The valid rows of a tile, rounded to the dtype of `base`."""
    store_columns(base, rows, row_stride, valid, low, D, 0, LOW)
    if HIGH:
        store_columns(base, rows, row_stride, valid, high, D, LOW, HIGH)


@triton.jit
def store_vector(base, low, high, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """One row of one head, rounded to the dtype of `base`."""
    columns = tl.arange(0, LOW)
    tl.store(base + columns, low.to(base.dtype.element_ty), mask=columns < D)
    if HIGH:
        columns = LOW + tl.arange(0, HIGH)
        tl.store(base + columns, high.to(base.dtype.element_ty), mask=columns < D)


@triton.jit
def halves(a):
    """Left and right half of a block's columns."""
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def row_halves(a):
    """Upper and lower half of a block's rows."""
    return tl.split(tl.permute(tl.reshape(a, (2, a.shape[0] // 2, a.shape[1])), (1, 2, 0)))


@triton.jit
def add_block_product(weights, b, product):
    """product + weights b, (R, S) x (S, W) added to (R, W), in fp32; halves S as `add_transposed` does W."""
    if b.dtype == tl.float32 and weights.shape[1] > FP32_COLUMNS:
        weights_left, weights_right = halves(weights)
        b_upper, b_lower = row_halves(b)
        product = add_block_product(weights_left, b_upper, product)
        product = add_block_product(weights_right, b_lower, product)
    else:
        product = tl.dot(weights.to(b.dtype), b, product, input_precision="ieee")
    return product


@triton.jit
def add_transposed(a, b, product):
    """product + a bT, (R, W) x (S, W) added to (R, S), in fp32.

    An fp32 product runs on scalar units, which hold all W columns of their rows in registers; halving W down to
    FP32_COLUMNS keeps that from spilling.
    """
    if a.dtype == tl.float32 and a.shape[1] > FP32_COLUMNS:
        a_left, a_right = halves(a)
        b_left, b_right = halves(b)
        product = add_transposed(a_left, b_left, product)
        product = add_transposed(a_right, b_right, product)
    else:
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def multiply_transposed(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """a bT of two tiles, (R, D) x (S, D) -> (R, S), in fp32; fp32 operands are not rounded to TF32."""
    product = add_transposed(a_low, b_low, tl.zeros((a_low.shape[0], b_low.shape[0]), tl.float32))
    if HIGH:
        product = add_transposed(a_high, b_high, product)
    return product


@triton.jit
def add_product(weights, b_low, b_high, sum_low, sum_high, HIGH: tl.constexpr):
    """sum + weights b for a tile b: (R, S) x (S, D) added to (R, D) in fp32; weights are rounded to the dtype of b."""
    sum_low = add_block_product(weights, b_low, sum_low)
    if HIGH:
        sum_high = add_block_product(weights, b_high, sum_high)
    else:
        sum_high = sum_low
    return sum_low, sum_high


@triton.jit
def multiply_vector(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """a b of a tile and a vector, (R, D) x (D,) -> (R,), in fp32."""
    product = tl.sum(a_low.to(tl.float32) * b_low[None, :], 1)
    if HIGH:
        product += tl.sum(a_high.to(tl.float32) * b_high[None, :], 1)
    return product


@triton.jit
def multiply_rows(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """Row by row product of two tiles, (R, D) x (R, D) -> (R,), in fp32."""
    product = tl.sum(a_low.to(tl.float32) * b_low.to(tl.float32), 1)
    if HIGH:
        product += tl.sum(a_high.to(tl.float32) * b_high.to(tl.float32), 1)
    return product


@triton.jit
def zero_tile(ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """A tile of fp32 zeros."""
    low = tl.zeros((ROWS, LOW), tl.float32)
    high = low
    if HIGH:
        high = tl.zeros((ROWS, HIGH), tl.float32)
    return low, high


@triton.jit
def weighted_rows(weights, b_low, b_high, HIGH: tl.constexpr):
    """weights b of a vector and a tile, (S,) x (S, D) -> (D,), in fp32."""
    low = tl.sum(weights[:, None] * b_low.to(tl.float32), 0)
    high = low
    if HIGH:
        high = tl.sum(weights[:, None] * b_high.to(tl.float32), 0)
    return low, high


@triton.jit
def outer(weights, b_low, b_high, HIGH: tl.constexpr):
    """Outer product (R,) x (D,) -> the tile (R, D), in fp32."""
    low = weights[:, None] * b_low[None, :]
    high = low
    if HIGH:
        high = weights[:, None] * b_high[None, :]
    return low, high
