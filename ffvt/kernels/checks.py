"""What the public operators ask of their arguments, and autocast."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prepare(name: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast says."""
    check_tensors(name, **tensors)
    return autocast(*tensors.values())


def check_tensors(name: str, **tensors: Tensor) -> None:
    """Refuses what is no tensor, and tangents, which would be lost without a word."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor; got {key}={tensor!r}")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: {key} must have no tangent, there is no forward-mode gradient; got one")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: {argument} must be one of {names}; got {argument}.dtype={tensor.dtype}")


def check_device(name: str, tensors: dict[str, Tensor]) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{key}.device={t.device}" for key, t in tensors.items())
        raise ValueError(f"{name}: all tensors must be on one device; got {got}")


def check_heads(name: str, tensors: dict[str, Tensor], layout: str) -> None:
    (argument, first), *others = tensors.items()
    for key, tensor in tensors.items():
        check_dtype(name, key, tensor)
        if tensor.ndim != layout.count(",") + 1 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name}: {key} must be {layout}, none but B zero; got {key}.shape={tuple(tensor.shape)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: {key} must have unit last stride; got {key}.stride()={tensor.stride()}")
    for key, tensor in others:
        if tensor.shape != first.shape:
            got = f"{argument}.shape={tuple(first.shape)}, {key}.shape={tuple(tensor.shape)}"
            raise ValueError(f"{name}: {argument} and {key} must have one shape; got {got}")
        if tensor.dtype != first.dtype:
            got = f"{argument}.dtype={first.dtype}, {key}.dtype={tensor.dtype}"
            raise TypeError(f"{name}: {argument} and {key} must have one dtype; got {got}")
    check_device(name, tensors)


def check_selection(
    name: str, num_tokens: int, head_dim: int, num_select: int, scale: float | None, first_candidate: int
) -> float:
    for key, value in (("num_select", num_select), ("first_candidate", first_candidate)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {key} must be an int; got {key}={value!r}")
    if not 0 <= first_candidate < num_tokens:
        raise ValueError(
            f"{name}: first_candidate must be in [0, N={num_tokens}); got first_candidate={first_candidate}"
        )
    if not 1 <= num_select <= num_tokens - first_candidate:
        raise ValueError(
            f"{name}: num_select must be in [1, N - first_candidate = {num_tokens - first_candidate}]; "
            f"got num_select={num_select}"
        )
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: scale must be a number or None; got scale={scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: scale must be finite; got scale={scale}")
    return float(scale)
