"""Which backend serves a call: the table of backends, the forced choice, and the reasons.

A backend is a module with the functions `<operator>_forward` / `<operator>_backward`, `missing() -> reasons` (why it
can serve nothing on this machine) and `unsupported(operator, *tensors) -> reasons` (why not this call); it may have
`slower() -> reasons` (why not here unless it is forced). The automatic choice goes by device and may change speed,
never results. A forced backend (`use_backend`) never falls back.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("ffvt")

BACKENDS = ("triton", "cpp", "torch", "reference")
AUTO = ""  # the operators' `backend` argument when nothing is forced

_MODULES = {
    "triton": "ffvt.kernels.backend_triton",
    "cpp": "ffvt.kernels.backend_cpp",
    "torch": "ffvt.kernels.backend_torch",
    "reference": "ffvt.kernels.reference",
}
_PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}
_DEFAULT_PREFERENCE = ("torch",)

_forced: list[str] = []  # names of the open use_backend blocks, the innermost last
_announced: set[tuple[str, str, str]] = set()


class use_backend:
    """Force one backend for every operator called inside the block (and for the backward of those calls).

    Args:
        name: "triton", "cpp", "torch" or "reference".

    Raises:
        ValueError: `name` is none of these.
        NotImplementedError: from an operator inside the block, when the backend cannot serve the call; the message
            gives every reason. A forced backend never falls back.

    The choice is process-wide, not per thread. Blocks nest; the one entered last holds.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}; got name={name!r}")
        self.name = name

    def __enter__(self) -> use_backend:
        _forced.append(self.name)
        return self

    def __exit__(self, *exc_info: object) -> None:
        youngest = len(_forced) - 1 - _forced[::-1].index(self.name)
        del _forced[youngest]


def forced_backend() -> str:
    """The name forced by the innermost `use_backend`, or "" for the automatic choice."""
    return _forced[-1] if _forced else AUTO


def resolve(operator: str, backend: str, *tensors: Tensor) -> ModuleType:
    """The module that serves this call of `operator`: the forced one, or the first of the device's preference."""
    device = tensors[0].device.type
    if backend != AUTO:
        reasons = _reasons(backend, operator, tensors)
        if reasons:
            raise NotImplementedError(f"{operator}: backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
        return importlib.import_module(_MODULES[backend])
    passed_over = []
    for name in _PREFERENCE.get(device, _DEFAULT_PREFERENCE):
        reasons = _reasons(name, operator, tensors) or _slower(name)
        if not reasons:
            _announce(operator, device, name, passed_over)
            return importlib.import_module(_MODULES[name])
        passed_over.append(f"{name}: {'; '.join(reasons)}")
    raise AssertionError(f"{operator}: no backend for {device}: {passed_over}")  # torch serves everything


def _reasons(backend: str, operator: str, tensors: tuple[Tensor, ...]) -> list[str]:
    return _load_reasons(backend) or importlib.import_module(_MODULES[backend]).unsupported(operator, *tensors)


@functools.cache
def _load_reasons(backend: str) -> list[str]:
    """Why the backend's module cannot be used at all."""
    try:
        importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    return []


def _missing(backend: str) -> list[str]:
    """Why the backend can serve no call on this machine."""
    return _load_reasons(backend) or importlib.import_module(_MODULES[backend]).missing()


def _slower(backend: str) -> list[str]:
    """Why the automatic choice passes over a backend that could serve."""
    reasons = getattr(importlib.import_module(_MODULES[backend]), "slower", None)
    return reasons() if reasons else []


def _announce(operator: str, device: str, name: str, passed_over: list[str]) -> None:
    if (operator, device, name) not in _announced:
        _announced.add((operator, device, name))
        log.info("%s on %s: served by %s%s", operator, device, name, f" ({', '.join(passed_over)})" * bool(passed_over))


def extension_info() -> dict[str, Any]:
    """What the compiled extension `ffvt._C` says of its build and of this CPU, or why it is missing."""
    try:
        from ffvt import _C
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    from ffvt.kernels import backend_cpp

    kernels = {} if backend_cpp.missing() else backend_cpp.facts()
    return {"available": True, **_C.build_info(), **_C.cpu_info(), **kernels}


def info() -> dict[str, Any]:
    """What serves each device, and why something is missing.

    Returns:
        A plain dict: versions (`ffvt`, `torch`, `triton`), `cpu_capability` and `gpu` as PyTorch sees them, `devices`
        (name -> the backend serving it, and why the preferred ones do not), `backends` (name -> "available" or the
        reason), `extension` (build, CPU and the kernels' capability, or why it is missing), `forced` (the name forced
        by `use_backend`, or None).
    """
    from ffvt.version import __version__

    backends = {name: "; ".join(_missing(name)) or "available" for name in BACKENDS}
    devices = {}
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            devices[device] = {"serves": None, "why": "torch.cuda.is_available() is False"}
            continue
        passed_over = {name: _missing(name) or _slower(name) for name in _PREFERENCE[device]}
        serving = next(name for name, reasons in passed_over.items() if not reasons)
        why = [f"{name}: {'; '.join(reasons)}" for name, reasons in passed_over.items() if reasons]
        devices[device] = {"serves": serving, "why": "; ".join(why) or "preferred"}
    return {
        "ffvt": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "devices": devices,
        "backends": backends,
        "extension": extension_info(),
        "forced": forced_backend() or None,
    }


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError as error:
        return f"missing: {error}"
