"""The public operators.

Each applies autocast and makes one registered call, `torch.ops.ffvt.<operator>`, that autograd, `torch.compile`,
`torch.export` and CUDA graphs see as one opaque node, and that checks its arguments (`registration.py`).

Gradients are those of `backward()` and `torch.autograd.grad`, once. There is no forward mode (`torch.func.jvp`), no
second gradient, and no `torch.func.grad` or `vjp`: PyTorch does not carry a registered operator's gradient into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffvt.kernels import registration  # noqa: F401  defines torch.ops.ffvt
from ffvt.kernels.backends import forced_backend
from ffvt.kernels.checks import as_int, as_scale, check_tensors, prepare


def maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that also picks the tokens with the largest mutual attention weight.

    Args:
        q, k, v: (B, N, H, D), one dtype of fp16, bf16, fp32, fp64, any strides with unit last stride. Token 0 is the
            class token. Under autocast they are cast to its dtype.
        num_select: K, how many tokens to pick, 1 <= K <= N - first_candidate.
        scale: factor of the logits, finite and positive; 1/sqrt(D) when None.
        first_candidate: tokens [0, first_candidate) are never picked; 0 is the authors' behaviour (the class token
            can be picked), 1 leaves out the class token.

    Returns:
        out: (B, N, H, D), dtype of q, contiguous. The only result that carries a gradient.
        index: (B, K) int64, best first; equal scores: lower index first; NaN ranks last.
        score: (B, N) fp32, mean_h softmax(S_h[0, :]) * mean_h softmax(S_h[:, 0]), of every token.

    Raises:
        ValueError: a shape, a stride or a value does not hold.
        TypeError: a dtype or a type does not.
        NotImplementedError: a backend forced by `use_backend` cannot serve the call; or forward mode.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention"
    q, k, v = prepare(name, q=q, k=k, v=v)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_attention(q, k, v, *selection, forced_backend())[:3]


def maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`maws_attention` on packed q, k, v: no copy on the way in, one packed gradient on the way out.

    Args:
        qkv: (B, N, 3, H, D), fp16, bf16, fp32 or fp64, any strides with unit last stride: the view of one linear
            layer's output.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        out (B, N, H, D), index (B, K) int64, score (B, N) fp32, as `maws_attention`. Only out carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention_qkvpacked"
    (qkv,) = prepare(name, qkv=qkv)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_attention_qkvpacked(qkv, *selection, forced_backend())[:3]


def maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """The picks of `maws_attention` without the attention: two thin products per head.

    Args:
        q, k: (B, N, H, D), as for `maws_attention`.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        index: (B, K) int64, best first. score: (B, N) fp32. Neither carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_select"
    q, k = prepare(name, q=q, k=k)
    selection = _selection(name, num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_select(q.detach(), k.detach(), *selection, forced_backend())


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Picks tokens: row index[b, i] of image b.

    Args:
        x: (B, N, C), fp16, bf16, fp32 or fp64.
        index: (B, K) int64, each in [0, N). The picks of one image are usually distinct; a repeated one receives the
            sum of its gradients.

    Returns:
        (B, K, C), dtype of x, contiguous. Carries a gradient to x.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: x is not floating point, index not int64.
        IndexError: an index outside [0, N) (CPU tensors; on a GPU it is not read back: the kernel gives a row of NaN).

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    check_tensors("gather_tokens", x=x, index=index)
    return torch.ops.ffvt.gather_tokens(x, index, forced_backend())


def _selection(name: str, num_select: int, scale: float | None, first_candidate: int) -> tuple[int, float | None, int]:
    num_select = as_int(name, "num_select", num_select)
    return num_select, as_scale(name, scale), as_int(name, "first_candidate", first_candidate)
