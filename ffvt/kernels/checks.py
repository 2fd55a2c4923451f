"""What the operators ask of their arguments, and autocast.

The public functions (`ops.py`) check types and strides, which only Python sees. The registered operators
(`registration.py`) check everything else, so that no way to call them, an exported program's included, goes round it.
"""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SCALE = torch.finfo(torch.float32).max / math.log2(math.e)  # the kernels multiply by scale * log2(e), in fp32


def prepare(name: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast says.

    Raises:
        TypeError: one is no tensor.
        ValueError: one has no unit last stride.
        NotImplementedError: one has a tangent.
    """
    check_tensors(name, **tensors)
    for key, tensor in tensors.items():
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: {key} must have unit last stride; got {key}.stride()={tensor.stride()}")
    return autocast(*tensors.values())


def check_tensors(name: str, **tensors: Tensor) -> None:
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor; got {key}={tensor!r}")
    if not torch.compiler.is_compiling():  # while compiling, the operator's fake sees the tangents
        refuse_tangents(name, **tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def as_int(name: str, key: str, value: int) -> int:
    """An int of Python or NumPy, or a symbolic one; not a bool."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    raise TypeError(f"{name}: {key} must be an int; got {key}={value!r}")


def as_scale(name: str, scale: float | None) -> float | None:
    """A number of Python or NumPy as a float; None stays."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float, numbers.Real)):
        raise TypeError(f"{name}: scale must be a number or None; got scale={scale!r}")
    return float(scale)


def refuse_tangents(name: str, **tensors: Tensor) -> None:
    """Forward mode: there is no such gradient, and the tangent would be lost without a word."""
    if forward_ad._current_level < 0:
        return
    for key, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: {key} must have no tangent, there is no forward-mode gradient; got one")


def refuse_forward_mode(name: str) -> None:
    """As `refuse_tangents`, of a program that is traced: whether its tensors have tangents cannot be seen there."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name}: forward mode must be off, there is no forward-mode gradient; got it on")


def check_dtype(name: str, key: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: {key} must be one of {names}; got {key}.dtype={tensor.dtype}")


def check_device(name: str, **tensors: Tensor) -> None:
    first, *others = tensors.values()
    if any(tensor.device != first.device for tensor in others):
        got = ", ".join(f"{key}.device={tensor.device}" for key, tensor in tensors.items())
        raise ValueError(f"{name}: all tensors must be on one device; got {got}")


def check_heads(name: str, layout: str, **tensors: Tensor) -> None:
    """Tensors of one shape, dtype and device, in a layout such as "(B, N, H, D)"."""
    (key, first), *others = tensors.items()
    check_dtype(name, key, first)
    if first.ndim != layout.count(",") + 1 or 0 in first.shape[1:]:
        raise ValueError(f"{name}: {key} must be {layout}, none but B zero; got {key}.shape={tuple(first.shape)}")
    for other, tensor in others:
        if tensor.shape != first.shape:
            got = f"{key}.shape={tuple(first.shape)}, {other}.shape={tuple(tensor.shape)}"
            raise ValueError(f"{name}: {key} and {other} must have one shape; got {got}")
        if tensor.dtype != first.dtype:
            got = f"{key}.dtype={first.dtype}, {other}.dtype={tensor.dtype}"
            raise TypeError(f"{name}: {key} and {other} must have one dtype; got {got}")
    check_device(name, **tensors)


def check_selection(name: str, num_tokens: int, num_select: int, first_candidate: int) -> None:
    if not 0 <= first_candidate < num_tokens:
        raise ValueError(
            f"{name}: first_candidate must be in [0, N={num_tokens}); got first_candidate={first_candidate}"
        )
    if not 1 <= num_select <= num_tokens - first_candidate:
        raise ValueError(
            f"{name}: num_select must be in [1, N - first_candidate = {num_tokens - first_candidate}]; "
            f"got num_select={num_select}"
        )


def check_scale(name: str, scale: float | None) -> None:
    if scale is None:
        return
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name}: scale must be finite and positive; got scale={scale}")
    if scale > MAX_SCALE:
        raise ValueError(f"{name}: scale must be at most {MAX_SCALE:.3g}, the range of fp32; got scale={scale}")


def check_dropout(name: str, x: Tensor, seed: Tensor, p: float) -> None:
    check_dtype(name, "x", x)
    if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device.type not in ("cpu", "meta"):
        got = f"seed.shape={tuple(seed.shape)}, seed.dtype={seed.dtype}, seed.device={seed.device}"
        raise ValueError(f"{name}: seed must be one int64 on the CPU; got {got}")
    if not 0 <= p < 1:
        raise ValueError(f"{name}: p must be in [0, 1); got p={p}")


def check_statistics(name: str, q: Tensor, **tensors: Tensor) -> None:
    """One fp32 number (fp64 for fp64 inputs) a query: (B, H, N), for q (B, N, H, D)."""
    batch, num_tokens, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    for key, tensor in tensors.items():
        if tensor.shape != (batch, heads, num_tokens):
            raise ValueError(f"{name}: {key} must be (B, H, N); got {key}.shape={tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {key} must be {dtype}; got {key}.dtype={tensor.dtype}")
    check_device(name, q=q, **tensors)


def check_weights(name: str, q: Tensor, weights: Tensor) -> None:
    """One fp32 number a query: (B, H, N), for q (B, N, H, D)."""
    batch, num_tokens, heads, _ = q.shape
    if weights.shape != (batch, heads, num_tokens):
        raise ValueError(f"{name}: weights must be (B, H, N); got weights.shape={tuple(weights.shape)}")
    if weights.dtype != torch.float32:
        raise TypeError(f"{name}: weights must be torch.float32; got weights.dtype={weights.dtype}")
    check_device(name, q=q, weights=weights)


def check_gather(name: str, layout: str, index: Tensor, **rows: Tensor) -> None:
    """Rows (B, ., C) of a floating dtype and index (B, K) int64, on one device."""
    ((key, tensor),) = rows.items()
    check_dtype(name, key, tensor)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: index must be int64; got index.dtype={index.dtype}")
    if tensor.ndim != 3 or index.ndim != 2 or tensor.shape[0] != index.shape[0]:
        raise ValueError(
            f"{name}: {key} must be {layout} and index (B, K); got {key}.shape={tuple(tensor.shape)}, "
            f"index.shape={tuple(index.shape)}"
        )
    check_device(name, **rows, index=index)


def check_index_range(index: Tensor, num_tokens: int) -> None:
    """IndexError unless every index is in [0, num_tokens). Reads the tensor: for host memory only."""
    if index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= num_tokens:
            worst = low if low < 0 else high
            raise IndexError(f"gather_tokens: index must be in [0, N={num_tokens}); got index={worst}")
