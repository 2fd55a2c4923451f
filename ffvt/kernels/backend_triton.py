"""The Triton backend: which calls its kernels serve, and the functions that serve them.

What: every operator on CUDA and ROCm devices; CPU tensors too under TRITON_INTERPRET=1, to check the kernels without a
GPU. Source of each kernel: see the `*_triton` modules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from ffvt.kernels.attention_stats_triton import attention_stats_forward
from ffvt.kernels.attention_vecmat_triton import attention_vecmat_forward
from ffvt.kernels.backend_torch import augment, dropout  # element by element: PyTorch's own kernels do it
from ffvt.kernels.gather_tokens_triton import gather_tokens_backward, gather_tokens_forward
from ffvt.kernels.maws_attention_backward_triton import maws_attention_backward
from ffvt.kernels.maws_attention_triton import maws_attention_forward
from ffvt.kernels.maws_select_triton import maws_select_forward
from ffvt.kernels.tiles_triton import MAX_EXTENT, MAX_HEAD_DIM, extent
from ffvt.kernels.tuning import MAX_TOKENS

__all__ = [
    "attention_stats_forward",
    "attention_vecmat_forward",
    "augment",
    "dropout",
    "gather_tokens_backward",
    "gather_tokens_forward",
    "maws_attention_backward",
    "maws_attention_forward",
    "maws_select_forward",
    "missing",
    "unsupported",
]
MIN_CAPABILITY = (8, 0)


def missing() -> list[str]:
    """Reasons why no call on this machine can be served."""
    if torch.cuda.is_available() or knobs.runtime.interpret:
        return []
    return ["no CUDA or ROCm device, and TRITON_INTERPRET is not set"]


def unsupported(operator: str, *tensors: Tensor) -> list[str]:
    """Reasons why this backend cannot serve a call."""
    first = tensors[0]
    reasons = _device_reasons(first)
    if operator in ("augment", "dropout"):
        return reasons
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype must be fp16, bf16 or fp32; got {first.dtype}")
    if operator != "gather_tokens":
        tokens, head_dim = first.shape[1], first.shape[3]
        if head_dim > MAX_HEAD_DIM:
            reasons.append(f"head dimension must be at most {MAX_HEAD_DIM}; got D={head_dim}")
        if tokens > MAX_TOKENS:
            reasons.append(f"the number of tokens must be at most {MAX_TOKENS}; got N={tokens}")
    if any(extent(tensor) > MAX_EXTENT for tensor in tensors):
        reasons.append(f"one image must lie within {MAX_EXTENT} elements of memory")
    return reasons


def _device_reasons(tensor: Tensor) -> list[str]:
    if tensor.device.type == "cpu":
        if not knobs.runtime.interpret:
            return ["device must be CUDA or ROCm; got cpu (TRITON_INTERPRET=1 serves it, to check the kernels)"]
        if tensor.dtype == torch.bfloat16:
            return ["Triton's interpreter multiplies bf16 matrices wrongly"]
        return []
    if tensor.device.type != "cuda":
        return [f"device must be CUDA or ROCm; got {tensor.device.type}"]
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < MIN_CAPABILITY:
        return [f"compute capability must be at least 8.0; got {torch.cuda.get_device_capability(tensor.device)}"]
    return []
