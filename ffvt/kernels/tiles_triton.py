"""Device functions that the attention kernels share: tiles of rows of one head, and their products.

A tile is one value, the tuple of its column blocks. A head dimension D that is no power of two is kept as two of them
(80 = 64 + 16, 96 = 64 + 32), so that nothing is padded to the next power of two. One row of a head is a tuple alike.

Names: B batch, N tokens, H heads, D head dimension; bh one head of all B * H; offs the tokens of a tile, mask which of
them exist; q, k, v, out and their gradients do, dq, dk, dv; m, l, acc maximum, sum and output of the online softmax;
s logits, p probabilities, ds gradient of the logits; alpha rescales what was added up under an older maximum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


def strided(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor (B, N, H, D) as kernels take it: its memory and the strides of (batch, token, head)."""
    return tensor, tensor.stride()[:3]


@triton.constexpr_function
def block_widths(D: int) -> tuple[int, ...]:
    """Widths of a tile's column blocks: one or two powers of two from 16 on, with the least sum that holds D <= 128."""
    whole = max(16, triton.next_power_of_2(D))
    halved = (whole // 2, max(16, triton.next_power_of_2(D - whole // 2)))
    return halved if whole > 16 and sum(halved) < whole else (whole,)


@triton.constexpr_function
def is_padded(D: int, PART: int) -> bool:
    """Whether a column block reaches past D."""
    return sum(block_widths(D)[: PART + 1]) > D


class Head(NamedTuple):
    """One head of a tensor: pointer to its token 0, and the stride from one token to the next."""

    ptr: Any
    stride: Any


@triton.jit
def head_of(tensor, bh, H):
    """Head bh of a strided tensor; its offset is in int64, as a batch can pass 2^31 elements."""
    ptr, stride = tensor
    return Head(ptr + (bh // H).to(tl.int64) * stride[0] + (bh % H).to(tl.int64) * stride[2], stride[1])


@triton.jit
def contiguous_head(ptr, bh, N, H, D: tl.constexpr):
    """The same of a contiguous tensor (B, N, H, D)."""
    return head_of((ptr, (N * H * D, H * D, D)), bh, H)


@triton.jit
def columns(D: tl.constexpr, PART: tl.constexpr):
    """Columns of a column block."""
    return PART * block_widths(D)[0] + tl.arange(0, block_widths(D)[PART])


@triton.jit
def load_block(head, offs, mask, D: tl.constexpr, PART: tl.constexpr):
    cols = columns(D, PART)
    ptrs = head.ptr + offs[:, None] * head.stride + cols[None, :]  # (R, W)
    if is_padded(D, PART):
        keep = cols[None, :] < D
        if mask is not None:
            keep = keep & mask[:, None]
        block = tl.load(ptrs, mask=keep, other=0.0)
    elif mask is not None:
        block = tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        block = tl.load(ptrs)
    return block


@triton.jit
def load_tile(head, offs, mask, D: tl.constexpr):
    """The tokens offs of a head, (R, D); those outside the mask read as zero. A mask of None: all exist."""
    tile = ()
    for i in tl.static_range(len(block_widths(D))):
        tile += (load_block(head, offs, mask, D, i),)
    return tile


@triton.jit
def load_row(head, D: tl.constexpr):
    """Token 0 of a head, the class token, in fp32: (D,)."""
    row = ()
    for i in tl.static_range(len(block_widths(D))):
        cols = columns(D, i)
        row += (tl.load(head.ptr + cols, mask=cols < D, other=0.0).to(tl.float32),)
    return row


@triton.jit
def zeros_like(row):
    """A row of zeros."""
    return [tl.zeros_like(block) for block in row]


@triton.jit
def store_tile(head, offs, mask, tile, D: tl.constexpr):
    """The tokens of a tile that exist, rounded to the dtype of the head."""
    for i in tl.static_range(len(tile)):
        cols = columns(D, i)
        keep = mask[:, None]
        if is_padded(D, i):
            keep = keep & (cols[None, :] < D)
        ptrs = head.ptr + offs[:, None] * head.stride + cols[None, :]
        tl.store(ptrs, tile[i].to(head.ptr.dtype.element_ty), mask=keep)


@triton.jit
def store_row(head, row, D: tl.constexpr):
    """Token 0 of a head, rounded to its dtype."""
    for i in tl.static_range(len(row)):
        cols = columns(D, i)
        tl.store(head.ptr + cols, row[i].to(head.ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def halves(a):
    """Left and right half of a block's columns."""
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def row_halves(a):
    """Upper and lower half of a block's rows."""
    return tl.split(tl.permute(tl.reshape(a, (2, a.shape[0] // 2, a.shape[1])), (1, 2, 0)))


@triton.jit
def add_block_product(p, b, acc):
    """acc + p b, (R, S) x (S, W) added to (R, W), in fp32; halves S as `add_block_transposed` does W."""
    if b.dtype == tl.float32 and p.shape[1] > FP32_COLUMNS:
        p_left, p_right = halves(p)
        b_upper, b_lower = row_halves(b)
        acc = add_block_product(p_left, b_upper, acc)
        acc = add_block_product(p_right, b_lower, acc)
    else:
        acc = tl.dot(p.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit
def add_block_transposed(a, b, acc):
    """acc + a bT, (R, W) x (S, W) added to (R, S), in fp32.

    An fp32 product runs on scalar units, which hold all W columns of their rows in registers; halving W down to
    FP32_COLUMNS keeps that from spilling.
    """
    if a.dtype == tl.float32 and a.shape[1] > FP32_COLUMNS:
        a_left, a_right = halves(a)
        b_left, b_right = halves(b)
        acc = add_block_transposed(a_left, b_left, acc)
        acc = add_block_transposed(a_right, b_right, acc)
    else:
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def dot_transposed(a, b):
    """a bT of two tiles, (R, D) x (S, D) -> (R, S), in fp32; fp32 operands are not rounded to TF32."""
    acc = tl.zeros((a[0].shape[0], b[0].shape[0]), tl.float32)
    for i in tl.static_range(len(a)):
        acc = add_block_transposed(a[i], b[i], acc)
    return acc


@triton.jit
def add_dot(acc, p, b):
    """acc + p b for tiles acc and b, (R, S) x (S, D) added to (R, D), in fp32; p is rounded to the dtype of b."""
    total = ()
    for i in tl.static_range(len(b)):
        total += (add_block_product(p, b[i], acc[i]),)
    return total


@triton.jit
def dot_row(a, b):
    """a b of a tile and a row, (R, D) x (D,) -> (R,), in fp32."""
    acc = tl.sum(a[0].to(tl.float32) * b[0][None, :], 1)
    for i in tl.static_range(1, len(a)):
        acc += tl.sum(a[i].to(tl.float32) * b[i][None, :], 1)
    return acc


@triton.jit
def dot_rows(a, b):
    """Row by row product of two tiles, (R, D) x (R, D) -> (R,), or of two rows, in fp32."""
    acc = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), len(a[0].shape) - 1)
    for i in tl.static_range(1, len(a)):
        acc += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), len(a[0].shape) - 1)
    return acc


@triton.jit
def outer(p, row):
    """p times a row, (R,) x (D,) -> the tile (R, D), in fp32."""
    return [p[:, None] * block[None, :] for block in row]


@triton.jit
def weighted_rows(p, b):
    """p b of weights and a tile, (S,) x (S, D) -> the row (D,), in fp32."""
    return [tl.sum(p[:, None] * block.to(tl.float32), 0) for block in b]


@triton.jit
def add(a, b):
    """Sum of two rows or tiles."""
    total = ()
    for i in tl.static_range(len(a)):
        total += (a[i] + b[i],)
    return total


@triton.jit
def scaled(tile, factor):
    """A tile or row times what broadcasts to each of its blocks."""
    return [block * factor for block in tile]
