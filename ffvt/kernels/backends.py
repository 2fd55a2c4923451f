"""Which backend serves a call: the table of backends, the forced choice, and the reasons.

A backend is a module with the functions of `Backend`. The automatic choice goes by device and may change speed, never
results. A forced backend (`use_backend`) never falls back.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Protocol

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


class Backend(Protocol):
    """The functions of a backend. What they compute: `reference.py`. The operators have checked the arguments.

    q, k, v, out, grad_out (B, N, H, D) have one shape and dtype and unit last stride; x (B, N, C), grad (B, K, C) and
    index (B, K) int64 have any strides. 1 <= num_select <= N - first_candidate, and scale > 0. Index values are not
    checked: a function reads them where that costs nothing.
    """

    def missing(self) -> list[str]:
        """Reasons why no call on this machine can be served."""

    def unsupported(self, operator: str, *tensors: Tensor) -> list[str]:
        """Reasons why this call cannot be served."""

    def maws_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """out (B, N, H, D) contiguous, index (B, K) int64, score (B, N) fp32, and two statistics of every query,
        (B, H, N) in fp32 (fp64 for fp64 inputs): row_max, a number that the backward takes from the products q kT
        before it scales them, and lse, the logarithm of the sum of exp(scale * (q kT - row_max)). A backend that
        takes nothing away gives a row_max of zeros."""

    def maws_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        row_max: Tensor,
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Writes the gradients of `out` into grads = (dq, dk, dv), each (B, N, H, D), any strides with unit last
        stride; out, lse and row_max are this backend's own, contiguous."""

    def attention_stats_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """out as above; row and column (B, H, N) fp32, the softmax of S[0, :] and that of S[:, 0]; lse and row_max as
        above, for `maws_attention_backward`."""

    def attention_vecmat_forward(
        self, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float
    ) -> Tensor:
        """sum_i weights_i exp(S_ij - lse_i), (B, H, N) fp32. weights (B, H, N) fp32, contiguous; lse (B, H, N) in fp32
        (fp64 for fp64 inputs), contiguous: the logarithm of the sum of exp(S_i) of every query, None to compute it."""

    def maws_select_forward(
        self, q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int
    ) -> tuple[Tensor, Tensor]:
        """index (B, K) int64, score (B, N) fp32."""

    def gather_tokens_forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Row index[b, i] of image b: (B, K, C). IndexError for an index outside, of a CPU tensor."""

    def gather_tokens_backward(self, grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
        """The gradient (B, N, C) of x; a token picked twice receives the sum."""

    def dropout(self, x: Tensor, seed: Tensor, p: float) -> Tensor:
        """x, contiguous, with each element zeroed where a hash of seed (one int64 on the CPU) and of its place is below
        p, 0 <= p < 1; the others over 1 - p."""

    def augment(self, images: Tensor, jitter: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        """Colour jitter and normalisation of images (B, 3, H, W) uint8 into out, fp32, contiguous. jitter (B, 4) fp32:
        factors of brightness, contrast and saturation, and the number of their order in `reference.ORDERS`; empty for
        none. scale, shift (3,) fp32."""


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


def resolve(operator: str, backend: str, *tensors: Tensor) -> Backend:
    """The module that serves this call of `operator`: the forced one, or the first of the device's preference."""
    device = tensors[0].device.type
    if backend not in (AUTO, *BACKENDS):
        raise ValueError(f"{operator}: backend must be one of {', '.join(BACKENDS)}; got backend={backend!r}")
    if backend != AUTO:
        reasons = _reasons(backend, operator, tensors)
        if reasons:
            raise NotImplementedError(f"{operator}: backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
        return _load(backend)
    passed_over = []
    for name in _PREFERENCE.get(device, _DEFAULT_PREFERENCE):
        reasons = _reasons(name, operator, tensors)
        if not reasons:
            _announce(operator, device, name, passed_over)
            return _load(name)
        passed_over.append(f"{name}: {'; '.join(reasons)}")
    raise AssertionError(f"{operator}: no backend for {device}: {passed_over}")  # torch serves everything


def _reasons(backend: str, operator: str, tensors: tuple[Tensor, ...]) -> list[str]:
    return _load_reasons(backend) or _load(backend).unsupported(operator, *tensors)


@functools.cache
def _load(backend: str) -> Backend:
    return importlib.import_module(_MODULES[backend])


@functools.cache
def _load_reasons(backend: str) -> list[str]:
    """Why the backend's module cannot be used at all."""
    try:
        _load(backend)
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    return []


def _missing(backend: str) -> list[str]:
    """Why the backend can serve no call on this machine."""
    return _load_reasons(backend) or _load(backend).missing()


@torch.compiler.assume_constant_result
def cpp_serves() -> bool:
    """Whether the C++ kernels serve calls on CPU tensors: they are there, and no other backend is forced."""
    return forced_backend() in (AUTO, "cpp") and not _missing("cpp")


def _announce(operator: str, device: str, name: str, passed_over: list[str]) -> None:
    if (operator, device, name) not in _announced:
        _announced.add((operator, device, name))
        level = logging.INFO if passed_over else logging.DEBUG  # the usual choice is in `info()`
        why = f" ({', '.join(passed_over)})" if passed_over else ""
        log.log(level, "%s on %s: served by %s%s", operator, device, name, why)


def cpu_products() -> str | None:
    """The operands that the C++ kernels multiply bf16 tensors with, "bf16" or "fp32"; None without those kernels."""
    return None if _missing("cpp") else _load("cpp").products()


def set_cpu_products(operands: str) -> None:
    """Has the C++ kernels multiply bf16 tensors with "bf16", "fp32" or the faster ("auto") operands, unless
    FFVT_CPU_PRODUCTS says which or the CPU does not multiply bf16: `cpu_products` tells."""
    _load("cpp").take_products(operands)


def extension_info() -> dict[str, Any]:
    """What the compiled extension `ffvt._C` says of its build and of this CPU, or why it is missing."""
    try:
        from ffvt import _C
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    reasons = _missing("cpp")
    kernels = {"kernels": "; ".join(reasons)} if reasons else _load("cpp").facts()
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
        passed_over = {name: _missing(name) for name in _PREFERENCE[device]}
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
