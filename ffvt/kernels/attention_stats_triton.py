"""attention_stats forward in Triton: the class token's row and column of every head as probabilities.

What: out and lse of the forward kernel of `maws_attention`, and the softmax of each of the two lines of logits that it
    leaves, (B, H, N) fp32.
How: two launches. The second, one program per head, turns both lines into probabilities where they lie: a line's
    softmax needs all its logits, the column's come from all programs of the first launch, and PyTorch's softmax would
    be two launches into two more arrays.
Memory: nothing beyond the results. The map exists only as tiles in registers.
Limits: as `maws_attention_triton`; N up to 8,192, as a line lives in one program's registers.
Source: FFVT (arXiv 2107.02341) section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffvt.kernels import tuning
from ffvt.kernels.maws_attention_triton import attend
from ffvt.kernels.maws_select_triton import softmax_of_lines


def attention_stats_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (B, N, H, D), row, column and lse (B, H, N) fp32, and the zeros that lse lacks."""
    B, N, H, _ = q.shape
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse, row, column = attend(q, k, v, scale)
        config = tuning.lines_config(N)
        if B:
            class_lines_kernel[(B * H,)](row, column, N, **config.constants, **config.options)
    return out, row, column, lse, torch.zeros_like(lse)


@triton.jit(do_not_specialize=["N"])
def class_lines_kernel(row_ptr, col_ptr, N, BLOCK: tl.constexpr):
    """The logits of both lines of one head become their softmax, BLOCK >= N."""
    token = tl.arange(0, BLOCK)
    mask = token < N
    offs = tl.program_id(0).to(tl.int64) * N + token[None, :]
    row, col = softmax_of_lines(row_ptr, offs, mask), softmax_of_lines(col_ptr, offs, mask)
    tl.store(row_ptr + offs, row, mask=mask[None, :])
    tl.store(col_ptr + offs, col, mask=mask[None, :])
