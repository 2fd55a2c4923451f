"""The rivals of `maws_attention_qkvpacked`: functions of packed qkv (B, N, 3, H, D), all differentiable; and
`flash_colreduce`, one of the selection alone.

SDPA, flash-attn and xformers give the output alone, so that they do less than what we are measured on; the others give
the picks too. Each takes its views of qkv as they are, without a copy of ours. A rival that is not installed, or that a
device does not serve, raises one of `harness.NOT_SERVED` when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ffvt
from benchmarks.authors_eager import mutual_attention_index
from ffvt.kernels import backend_torch

Rival = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]  # qkv, K -> out (B, N, H, D), index (B, K) or None
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EAGER, COMPILED, COMPOSITION, OURS = "authors' eager", "authors' eager, compiled", "composition", "ours"
MAPS_LIMIT = 24 * 2**30  # bytes of the authors' maps; larger ones would push out the other rivals' state


def ours(backend: str | None) -> Rival:
    """The operator, on the backend that is forced, or on the automatic choice."""

    def attend(qkv: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
        forced: AbstractContextManager = ffvt.use_backend(backend) if backend else nullcontext()
        with forced:
            return ffvt.maws_attention_qkvpacked(qkv, num_select)[:2]

    return attend


def sdpa(kind: SDPBackend | None) -> Rival:
    """SDPA, with the backend pinned (None: PyTorch's choice)."""

    def attend(qkv: Tensor, num_select: int) -> tuple[Tensor, None]:
        pinned: AbstractContextManager = sdpa_kernel([kind]) if kind is not None else nullcontext()
        with pinned:
            out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
        return out.transpose(1, 2), None

    return attend


def composition(kind: SDPBackend | None) -> Rival:
    """SDPA, and beside it the one row and column, their softmaxes, the product and top-k in PyTorch."""
    attention = sdpa(kind)

    def attend(qkv: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.detach().unbind(2)
        index, _ = backend_torch.maws_select_forward(q, k, num_select, qkv.shape[-1] ** -0.5, 0)
        return attention(qkv, num_select)[0], index

    return attend


def authors_eager(qkv: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    """Two N x N softmax maps, as in `benchmarks.authors_eager`.

    Raises:
        RuntimeError: the maps of a call and its backward would take more than `MAPS_LIMIT`.
    """
    batch, tokens, _, num_heads, head_dim = qkv.shape
    maps = 6 * batch * num_heads * tokens * tokens * qkv.element_size()  # scores, two maps, and their gradients
    if maps > MAPS_LIMIT:
        raise RuntimeError(f"authors_eager: maps must take at most {MAPS_LIMIT >> 30} GiB; got {maps / 2**30:.0f} GiB")
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    scores = torch.matmul(q, k.transpose(-1, -2)) / head_dim**0.5
    probs, weights = F.softmax(scores, dim=-1), F.softmax(scores, dim=-2)
    out = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
    return out, mutual_attention_index(weights[:, :, :, 0], probs, num_select)


def authors_compiled(qkv: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    """The authors' form through torch.compile, once per shape."""
    torch._functorch.config.donated_buffer = False  # its graph is kept, to time its backward alone
    return torch.compile(authors_eager, dynamic=False)(qkv, num_select)


def flash_attn(qkv: Tensor, num_select: int) -> tuple[Tensor, None]:
    """The flash-attn package."""
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv), None


def xformers(qkv: Tensor, num_select: int) -> tuple[Tensor, None]:
    """The xformers package."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2)), None


def flash_colreduce(q: Tensor, k: Tensor) -> Tensor:
    """The flash-colreduce package: the sums of all columns of q's and k's attention map (B, H, N), and nothing else."""
    from flash_colreduce import flash_colreduce

    return flash_colreduce(q.transpose(1, 2), k.transpose(1, 2), reduction="sum")


RIVALS: dict[str, dict[str, Rival]] = {  # by device
    "cpu": {
        EAGER: authors_eager,
        COMPILED: authors_compiled,
        COMPOSITION: composition(None),
        "SDPA alone": sdpa(None),
        OURS: ours(None),
    },
    "cuda": {
        OURS: ours(None),
        EAGER: authors_eager,
        COMPILED: authors_compiled,
        **{f"composition, SDPA {name}": composition(kind) for name, kind in SDPA.items()},
        **{f"SDPA {name}": sdpa(kind) for name, kind in SDPA.items()},
        "flash-attn": flash_attn,
        "xformers": xformers,
    },
}
