"""The C++ backend: which instructions it uses on this CPU, which calls it serves, and the functions that serve them.

What: every operator on CPU tensors. The kernels are compiled once for every capability (setup.py); the best that the
CPU, PyTorch (ATEN_CPU_CAPABILITY) and FFVT_CPU_CAPABILITY allow is loaded with this module, whose functions are the
extension's own. Products of bf16 tensors take bf16 operands or, widened, fp32 ones, whichever a timing of a few tiles
shows to be faster on this CPU; FFVT_CPU_PRODUCTS forces one. Source of each kernel: see `csrc/`.
Limits: x86 with AVX2; elsewhere this module cannot be imported, and the ImportError says why.
"""

from __future__ import annotations

import importlib
import os
import platform
from types import ModuleType

import torch
from torch import Tensor

from ffvt import _C

CAPABILITIES = ("avx512_bf16", "avx512", "avx2")  # each includes those behind it
VARIABLE = "FFVT_CPU_CAPABILITY"
PRODUCTS_VARIABLE = "FFVT_CPU_PRODUCTS"
_OF_PYTORCH = {"AVX512": "avx512_bf16", "AVX2": "avx2"}  # how PyTorch's capability begins: the most of ours it allows


def allowed() -> tuple[str, ...]:
    """The capabilities of this CPU that PyTorch is allowed to use, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    most = next((ours for prefix, ours in _OF_PYTORCH.items() if capability.startswith(prefix)), None)
    cpu, best = _C.cpu_info(), CAPABILITIES[CAPABILITIES.index(most) :] if most else ()
    return tuple(name for name in best if cpu[name])


def _load() -> ModuleType:
    """The kernels of the forced capability, or of the best that is built."""
    forced, usable = os.environ.get(VARIABLE), allowed()
    if forced and forced not in CAPABILITIES:
        raise ImportError(f"{VARIABLE} must be one of {', '.join(CAPABILITIES)}; got {forced!r}")
    if not usable:
        raise ImportError(
            f"the kernels need x86 with AVX2; got {platform.machine()}, and PyTorch uses "
            f"{torch.backends.cpu.get_cpu_capability()} (ATEN_CPU_CAPABILITY limits it)"
        )
    if forced and forced not in usable:
        raise ImportError(f"{VARIABLE}={forced}, and this CPU or ATEN_CPU_CAPABILITY allows only {', '.join(usable)}")
    errors = []
    for name in [forced] if forced else usable:
        try:
            return importlib.import_module(f"ffvt._cpu_{name}")
        except ImportError as error:
            errors.append(str(error))
    raise ImportError(f"not built: {'; '.join(errors)}")


def force_products(operands: str) -> None:
    """The operands of products of bf16 tensors from now on: "bf16", "fp32" (widened), or "auto", the faster.

    Raises:
        ValueError: another name, or "bf16" where this CPU or this build does not multiply bf16.
    """
    KERNELS.force_products(operands)


def take_products(operands: str) -> None:
    """`force_products`, but for what FFVT_CPU_PRODUCTS forces and for what this CPU cannot do."""
    forced = os.environ.get(PRODUCTS_VARIABLE) or "auto"
    if forced == "auto" and (operands == "fp32" or KERNELS.product_rates()[0] > 0):
        force_products(operands)


def products() -> str:
    """The operands that products of bf16 tensors take now: "bf16" or "fp32"."""
    return "bf16" if KERNELS.bf16_products() else "fp32"


KERNELS = _load()
if os.environ.get(PRODUCTS_VARIABLE):
    try:
        force_products(os.environ[PRODUCTS_VARIABLE])
    except ValueError as error:
        raise ImportError(f"{PRODUCTS_VARIABLE}: {error}") from None
maws_attention_forward = KERNELS.maws_attention_forward
maws_attention_backward = KERNELS.maws_attention_backward
attention_stats_forward = KERNELS.attention_stats_forward
attention_vecmat_forward = KERNELS.attention_vecmat_forward
maws_select_forward = KERNELS.maws_select_forward
gather_tokens_forward = KERNELS.gather_tokens_forward
gather_tokens_backward = KERNELS.gather_tokens_backward
augment = KERNELS.augment
dropout = KERNELS.dropout


def facts() -> dict[str, str | dict[str, float]]:
    """The capability that is used, the operands of products of bf16 tensors, and the GFLOP/s of one thread with each of
    them in tiles of the kernels (0.0: not there, not right, or oneDNN is switched off)."""
    bf16, fp32 = KERNELS.product_rates()
    return {
        "capability": KERNELS.__name__.rpartition("_cpu_")[2],
        "bf16_products": products(),
        "product_gflops": {"bf16": round(bf16, 1), "fp32": round(fp32, 1)},
    }


def missing() -> list[str]:
    """Reasons why no call on this machine can be served: none, once the kernels are loaded."""
    return []


def unsupported(operator: str, *tensors: Tensor) -> list[str]:
    """Reasons why this backend cannot serve a call."""
    reasons, first = [], tensors[0]
    if first.device.type != "cpu":
        reasons.append(f"device must be cpu; got {first.device.type}")
    if operator != "augment" and first.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype must be fp16, bf16 or fp32; got {first.dtype}")
    return reasons
