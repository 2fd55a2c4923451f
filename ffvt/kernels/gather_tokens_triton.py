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
    batch, num_select = index.shape
    width = x.shape[2]
    if index.device.type == "cpu":
        check_index_range(index, x.shape[1])
    out = torch.empty(batch, num_select, width, dtype=x.dtype, device=x.device)
    config = tuning.gather()
    if out.numel():
        gather_kernel[(batch * num_select,)](
            *(x, index, out, *x.stride(), *index.stride(), num_select, x.shape[1], width),
            **config.constants,
            **config.options,
        )
    return out


def gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient (B, N, C) of the gathered input; a token picked twice receives the sum."""
    batch, num_select, width = grad.shape
    out = torch.empty(batch, num_tokens, width, dtype=grad.dtype, device=grad.device)
    config = tuning.scatter()
    rows, columns = config.constants["ROWS"], config.constants["COLUMNS"]
    if out.numel():
        blocks = triton.cdiv(num_tokens, rows) * triton.cdiv(width, columns)
        scatter_kernel[(batch * blocks,)](
            *(grad, index, out, *grad.stride(), *index.stride(), num_select, num_tokens, width),
            **config.constants,
            **config.options,
        )
    return out


@triton.jit(do_not_specialize=["num_select", "tokens"])
def gather_kernel(
    x,
    index,
    out,
    x_batch,
    x_row,
    x_column,
    index_batch,
    index_column,
    num_select,
    tokens,
    width,
    COLUMNS: tl.constexpr,
):
    """One picked row; NaN where the index lies outside, as a GPU cannot raise."""
    place = tl.program_id(0)
    image = (place // num_select).to(tl.int64)
    token = tl.load(index + image * index_batch + place % num_select * index_column)
    x += image * x_batch + token * x_row
    exists = (token >= 0) & (token < tokens)
    out += place.to(tl.int64) * width
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        values = tl.load(x + columns * x_column, mask=inside & exists, other=float("nan"))
        tl.store(out + columns, values, mask=inside)


@triton.jit(do_not_specialize=["num_select", "tokens"])
def scatter_kernel(
    grad,
    index,
    out,
    grad_batch,
    grad_row,
    grad_column,
    index_batch,
    index_column,
    num_select,
    tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS x COLUMNS elements of the gradient of one image."""
    row_blocks = tl.cdiv(tokens, ROWS)
    column_blocks = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) % (row_blocks * column_blocks)
    image = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    first = block // column_blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    grad += image * grad_batch
    index += image * index_batch
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for place in range(0, num_select):
        token = tl.load(index + place * index_column)
        if (token >= first) & (token < first + ROWS):
            picked = tl.load(grad + place * grad_row + columns * grad_column, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(rows[:, None] == token, picked[None, :], 0.0)
    pointers = out + (image * tokens + rows[:, None]) * width + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(rows[:, None] < tokens) & inside[None, :])
