"""The C++ backend: which instructions it uses on this CPU, which calls it serves, and the functions that serve them.

What: every operator on CPU tensors. The kernels are compiled once for every capability (setup.py); the best that the
CPU, PyTorch (ATEN_CPU_CAPABILITY) and FFVT_CPU_CAPABILITY allow is loaded. Source of each kernel: see `csrc/`.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from ffvt import _C
from ffvt.kernels.reference import check_index_range

CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "default")  # each includes those behind it
VARIABLE = "FFVT_CPU_CAPABILITY"
_OF_PYTORCH = {"AVX512": "avx512_bf16", "AVX2": "avx2"}  # how PyTorch's capability begins: the most of ours it allows


@functools.cache
def missing() -> list[str]:
    """Reasons why no call on this machine can be served."""
    forced = os.environ.get(VARIABLE)
    if forced and forced not in CAPABILITIES:
        return [f"{VARIABLE} must be one of {', '.join(CAPABILITIES)}; got {forced!r}"]
    if forced and forced not in allowed():
        return [f"{VARIABLE}={forced}, and this CPU or ATEN_CPU_CAPABILITY allows only {', '.join(allowed())}"]
    try:
        kernels()
    except ImportError as error:
        return [f"not built: {error}"]
    return []


def allowed() -> tuple[str, ...]:
    """The capabilities of this CPU that PyTorch is allowed to use, best first."""
    cpu = _C.cpu_info()
    capability = torch.backends.cpu.get_cpu_capability()
    pytorch = next((ours for prefix, ours in _OF_PYTORCH.items() if capability.startswith(prefix)), "default")
    best = CAPABILITIES[CAPABILITIES.index(pytorch) :]
    return tuple(name for name in best if name == "default" or cpu[name])


@functools.cache
def kernels() -> ModuleType:
    """The module of this CPU's kernels: of the forced capability, or of the best that is built.

    Raises:
        ImportError: there is none.
    """
    errors = []
    for name in [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else allowed():
        try:
            return importlib.import_module(f"ffvt._cpu_{name}")
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


def slower() -> list[str]:
    """Reasons why the automatic choice passes this backend over, although it could serve."""
    if kernels().__name__.endswith("_default"):
        return ["PyTorch's own kernels are faster than the portable ones"]
    return []


def facts() -> dict[str, str | bool]:
    """The capability that is used, and whether bf16 is multiplied as it is (else in fp32)."""
    module = kernels()
    return {"capability": module.__name__.rpartition("_cpu_")[2], "multiplies_bf16": module.multiplies_bf16()}


def unsupported(operator: str, *tensors: Tensor) -> list[str]:
    """Reasons why this backend cannot serve a call."""
    reasons = list(missing())
    first = tensors[0]
    if first.device.type != "cpu":
        reasons.append(f"device must be cpu; got {first.device.type}")
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype must be fp16, bf16 or fp32; got {first.dtype}")
    return reasons


def maws_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels().maws_attention_forward(q, k, v, num_select, scale, first_candidate)


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
    kernels().maws_attention_backward(grad_out, q, k, v, out, lse, scale, *grads)


def maws_select_forward(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
) -> tuple[Tensor, Tensor]:
    return kernels().maws_select_forward(q, k, num_select, scale, first_candidate)


def gather_tokens_forward(x: Tensor, index: Tensor) -> Tensor:
    check_index_range(index, x.shape[1])
    return kernels().gather_tokens_forward(x, index)


def augment(images: Tensor, jitter: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Colour jitter and normalisation of uint8 pictures into `out`; see csrc/kernels.h and ffvt/data/transforms.py."""
    if jitter.numel() and not bool(((jitter[:, 3] >= 0) & (jitter[:, 3] < 6)).all()):
        raise ValueError(f"augment: orders must be 0 to 5; got {jitter[:, 3].tolist()}")
    kernels().augment(images, jitter, scale, shift, out)


def gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient (B, N, C) of the gathered input; a token picked twice receives the sum."""
    check_index_range(index, num_tokens)
    return kernels().gather_tokens_backward(grad, index, num_tokens)
