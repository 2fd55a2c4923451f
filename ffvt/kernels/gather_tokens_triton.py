"""gather_tokens in Triton: rows out, and their gradient back in one pass.

What: (B, N, C), (B, K) -> (B, K, C), and the gradient (B, N, C) of the input.
How: forward copies one row per program. Backward writes each element of the gradient once: a program owns a block of
    rows, starts from zero and adds the picks that fall in the block, in the order of the picks. No fill before it, no
    atomics; a row that is picked twice gets the sum, in fp32, the same every time.
Memory: the results.
Limits: fp16, bf16, fp32; one image of x within 2^31 elements.
Source: FFVT (arXiv 2107.02341), section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.checks import check_index_range


def gather_tokens_forward(x: Tensor, index: Tensor) -> Tensor:
    """The picked tokens (B, K, C) of x (B, N, C)."""
    B, K = index.shape
    N, C = x.shape[1:]
    if index.device.type == "cpu":
        check_index_range(index, N)
    out = torch.empty(B, K, C, dtype=x.dtype, device=x.device)
    config = tuning.GATHER
    if out.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            gather_kernel[(B * K,)](
                *((x, x.stride()), (index, index.stride()), out, K, N, C), **config.constants, **config.options
            )
    return out


def gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient (B, N, C) of the gathered input; a token picked twice receives the sum."""
    B, K, C = grad.shape
    out = torch.empty(B, num_tokens, C, dtype=grad.dtype, device=grad.device)
    config = tuning.SCATTER
    if out.numel():
        tiles = triton.cdiv(num_tokens, config.constants["ROWS"]) * triton.cdiv(C, config.constants["COLUMNS"])
        with torch.cuda.device_of(grad):
            scatter_kernel[(B * tiles,)](
                *((grad, grad.stride()), (index, index.stride()), out, K, num_tokens, C),
                **config.constants,
                **config.options,
            )
    return out


@triton.jit(do_not_specialize=["K", "N"])
def gather_kernel(x, index, out_ptr, K, N, C, COLUMNS: tl.constexpr):
    """One picked row; NaN where the index lies outside, as a GPU cannot raise."""
    x_ptr, x_stride = x
    index_ptr, index_stride = index
    place = tl.program_id(0)
    image = (place // K).to(tl.int64)
    token = tl.load(index_ptr + image * index_stride[0] + place % K * index_stride[1])
    x_ptr += image * x_stride[0] + token * x_stride[1]
    exists = (token >= 0) & (token < N)
    out_ptr += place.to(tl.int64) * C
    for start in range(0, C, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        mask = cols < C
        values = tl.load(x_ptr + cols * x_stride[2], mask=mask & exists, other=float("nan"))
        tl.store(out_ptr + cols, values, mask=mask)


@triton.jit(do_not_specialize=["K", "N"])
def scatter_kernel(grad, index, out_ptr, K, N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS x COLUMNS elements of the gradient of one image."""
    grad_ptr, grad_stride = grad
    index_ptr, index_stride = index
    row_tiles, col_tiles = tl.cdiv(N, ROWS), tl.cdiv(C, COLUMNS)
    tile = tl.program_id(0) % (row_tiles * col_tiles)
    image = (tl.program_id(0) // (row_tiles * col_tiles)).to(tl.int64)
    first = tile // col_tiles * ROWS
    offs = first + tl.arange(0, ROWS)
    cols = tile % col_tiles * COLUMNS + tl.arange(0, COLUMNS)
    mask = cols < C
    grad_ptr += image * grad_stride[0]
    index_ptr += image * index_stride[0]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for place in range(0, K):
        token = tl.load(index_ptr + place * index_stride[1])
        if (token >= first) & (token < first + ROWS):
            ptrs = grad_ptr + place * grad_stride[1] + cols * grad_stride[2]
            picked = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            acc += tl.where(offs[:, None] == token, picked[None, :], 0.0)
    ptrs = out_ptr + (image * N + offs[:, None]) * C + cols[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs[:, None] < N) & mask[None, :])
