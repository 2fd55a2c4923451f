"""The registered operators `torch.ops.ffvt.*`: schemas, checks, kernels and fakes.

A registered kernel checks what every backend relies on, asks `backends.resolve` for the module that serves the call,
and calls it (`backends.Backend` says how). Whoever calls, the public functions, an exported program or autograd with
tensors that a hook has relaid, the checks are the same; the fakes make them while a program is traced. The forced
backend travels as an argument, so that a backward runs on the backend of its forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ffvt.kernels import flops, gradients
from ffvt.kernels.backends import resolve
from ffvt.kernels.checks import (
    check_dropout,
    check_gather,
    check_heads,
    check_scale,
    check_selection,
    check_statistics,
    check_weights,
    refuse_forward_mode,
    refuse_tangents,
)

SEPARATE, PACKED = "(B, N, H, D)", "(B, N, 3, H, D)"
_LIBRARY = torch.library.Library("ffvt", "DEF")
_Attended = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, index, score, lse, row_max


def _unit(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is unit, as the kernels take for granted."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def _check_selecting(
    name: str, layout: str, num_select: int, scale: float | None, first_candidate: int, **tensors: Tensor
) -> None:
    check_heads(name, layout, **tensors)
    if layout == PACKED:
        _check_packed(name, tensors["qkv"])
    num_tokens = next(iter(tensors.values())).shape[1]
    check_selection(name, num_tokens, num_select, first_candidate)
    check_scale(name, scale)


def _check_packed(name: str, qkv: Tensor) -> None:
    if qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must be {PACKED}; got qkv.shape={tuple(qkv.shape)}")


# maws_attention


def _maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> _Attended:
    refuse_tangents("maws_attention", q=q, k=k, v=v)
    _check_selecting("maws_attention", SEPARATE, num_select, scale, first_candidate, q=q, k=k, v=v)
    q, k, v = _unit(q), _unit(k), _unit(v)
    module = resolve("maws_attention", backend, q, k, v)
    return module.maws_attention_forward(q, k, v, num_select, _scale(scale, q.shape[-1]), first_candidate)


def _maws_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> _Attended:
    refuse_forward_mode("maws_attention")
    _check_selecting("maws_attention", SEPARATE, num_select, scale, first_candidate, q=q, k=k, v=v)
    return _empty_results(q, num_select)


def _empty_results(q: Tensor, num_select: int) -> _Attended:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), *_empty_picks(q, num_select), _empty_lines(q, wide), _empty_lines(q, wide)


def _empty_lines(q: Tensor, dtype: torch.dtype) -> Tensor:
    batch, num_tokens, heads, _ = q.shape
    return q.new_empty(batch, heads, num_tokens, dtype=dtype)


def _empty_picks(q: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    batch, num_tokens = q.shape[:2]
    return q.new_empty(batch, num_select, dtype=torch.int64), q.new_empty(batch, num_tokens, dtype=torch.float32)


def _maws_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "maws_attention_backward"
    check_heads(name, SEPARATE, q=q, k=k, v=v, out=out, grad_out=grad_out)
    check_statistics(name, q, lse=lse, row_max=row_max)
    check_scale(name, scale)
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    grad_out, q, k, v, out = (_unit(t) for t in (grad_out, q, k, v, out))
    lse, row_max = lse.contiguous(), row_max.contiguous()
    module = resolve("maws_attention", backend, q, k, v)
    module.maws_attention_backward(grad_out, q, k, v, out, lse, row_max, _scale(scale, q.shape[-1]), grads)
    return grads


def _maws_attention_backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# maws_attention_qkvpacked


def _maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> _Attended:
    name = "maws_attention_qkvpacked"
    refuse_tangents(name, qkv=qkv)
    _check_selecting(name, PACKED, num_select, scale, first_candidate, qkv=qkv)
    q, k, v = _unit(qkv).unbind(2)
    module = resolve(name, backend, q, k, v)
    return module.maws_attention_forward(q, k, v, num_select, _scale(scale, q.shape[-1]), first_candidate)


def _maws_attention_qkvpacked_fake(
    qkv: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> _Attended:
    refuse_forward_mode("maws_attention_qkvpacked")
    _check_selecting("maws_attention_qkvpacked", PACKED, num_select, scale, first_candidate, qkv=qkv)
    return _empty_results(qkv.select(2, 0), num_select)


def _maws_attention_qkvpacked_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, row_max: Tensor, scale: float | None, backend: str
) -> Tensor:
    name = "maws_attention_qkvpacked_backward"
    check_heads(name, PACKED, qkv=qkv)
    _check_packed(name, qkv)
    q, k, v = _unit(qkv).unbind(2)
    check_heads(name, SEPARATE, q=q, out=out, grad_out=grad_out)
    check_statistics(name, q, lse=lse, row_max=row_max)
    check_scale(name, scale)
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    module = resolve("maws_attention_qkvpacked", backend, q, k, v)
    saved = (_unit(out), lse.contiguous(), row_max.contiguous())
    module.maws_attention_backward(_unit(grad_out), q, k, v, *saved, _scale(scale, q.shape[-1]), grad.unbind(2))
    return grad


def _maws_attention_qkvpacked_backward_fake(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


# attention_stats


def _attention_stats(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> _Attended:
    refuse_tangents("attention_stats", q=q, k=k, v=v)
    check_heads("attention_stats", SEPARATE, q=q, k=k, v=v)
    check_scale("attention_stats", scale)
    q, k, v = _unit(q), _unit(k), _unit(v)
    module = resolve("attention_stats", backend, q, k, v)
    return module.attention_stats_forward(q, k, v, _scale(scale, q.shape[-1]))


def _attention_stats_fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> _Attended:
    refuse_forward_mode("attention_stats")
    check_heads("attention_stats", SEPARATE, q=q, k=k, v=v)
    check_scale("attention_stats", scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    lines = (_empty_lines(q, dtype) for dtype in (torch.float32, torch.float32, wide, wide))
    return q.new_empty(q.shape), *lines


# attention_vecmat


def _attention_vecmat(
    weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    refuse_tangents("attention_vecmat", weights=weights, q=q, k=k)
    _check_vecmat(weights, q, k, lse, scale)
    q, k = _unit(q), _unit(k)
    lse = None if lse is None else lse.contiguous()
    module = resolve("attention_vecmat", backend, q, k)
    return module.attention_vecmat_forward(weights.contiguous(), q, k, lse, _scale(scale, q.shape[-1]))


def _attention_vecmat_fake(
    weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    refuse_forward_mode("attention_vecmat")
    _check_vecmat(weights, q, k, lse, scale)
    return _empty_lines(q, torch.float32)


def _check_vecmat(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, scale: float | None) -> None:
    name = "attention_vecmat"
    check_heads(name, SEPARATE, q=q, k=k)
    check_weights(name, q, weights)
    if lse is not None:
        check_statistics(name, q, lse=lse)
    check_scale(name, scale)


# maws_select


def _maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor]:
    refuse_tangents("maws_select", q=q, k=k)
    _check_selecting("maws_select", SEPARATE, num_select, scale, first_candidate, q=q, k=k)
    q, k = _unit(q), _unit(k)
    module = resolve("maws_select", backend, q, k)
    return module.maws_select_forward(q, k, num_select, _scale(scale, q.shape[-1]), first_candidate)


def _maws_select_fake(
    q: Tensor, k: Tensor, num_select: int, scale: float | None, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("maws_select")
    _check_selecting("maws_select", SEPARATE, num_select, scale, first_candidate, q=q, k=k)
    return _empty_picks(q, num_select)


# gather_tokens


def _gather_tokens(x: Tensor, index: Tensor, backend: str) -> Tensor:
    refuse_tangents("gather_tokens", x=x)
    check_gather("gather_tokens", "(B, N, C)", index, x=x)
    return resolve("gather_tokens", backend, x, index).gather_tokens_forward(x, index)


def _gather_tokens_fake(x: Tensor, index: Tensor, backend: str) -> Tensor:
    refuse_forward_mode("gather_tokens")
    check_gather("gather_tokens", "(B, N, C)", index, x=x)
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int, backend: str) -> Tensor:
    name = "gather_tokens_backward"
    check_gather(name, "(B, K, C)", index, grad=grad)
    if grad.shape[1] != index.shape[1]:
        got = f"grad.shape={tuple(grad.shape)}, index.shape={tuple(index.shape)}"
        raise ValueError(f"{name}: grad and index must have one K; got {got}")
    return resolve("gather_tokens", backend, grad, index).gather_tokens_backward(grad, index, num_tokens)


def _gather_tokens_backward_fake(grad: Tensor, index: Tensor, num_tokens: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


# dropout


def _dropout(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    refuse_tangents("dropout", x=x)
    check_dropout("dropout", x, seed, p)
    return resolve("dropout", backend, x).dropout(x.contiguous(), seed, p)


def _dropout_fake(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    refuse_forward_mode("dropout")
    check_dropout("dropout", x, seed, p)
    return x.new_empty(x.shape)


_SELECT = "SymInt num_select, float? scale, SymInt first_candidate, str backend"
_HEADS = "Tensor q, Tensor k, Tensor v"
_SAVED = "Tensor out, Tensor lse, Tensor row_max, float? scale, str backend"
_ATTENDED = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_OPERATORS = {
    f"maws_attention({_HEADS}, {_SELECT}) -> {_ATTENDED}": (_maws_attention, _maws_attention_fake),
    f"maws_attention_backward(Tensor grad_out, {_HEADS}, {_SAVED}) -> (Tensor, Tensor, Tensor)": (
        _maws_attention_backward,
        _maws_attention_backward_fake,
    ),
    f"maws_attention_qkvpacked(Tensor qkv, {_SELECT}) -> {_ATTENDED}": (
        _maws_attention_qkvpacked,
        _maws_attention_qkvpacked_fake,
    ),
    f"maws_attention_qkvpacked_backward(Tensor grad_out, Tensor qkv, {_SAVED}) -> Tensor": (
        _maws_attention_qkvpacked_backward,
        _maws_attention_qkvpacked_backward_fake,
    ),
    f"attention_stats({_HEADS}, float? scale, str backend) -> {_ATTENDED}": (_attention_stats, _attention_stats_fake),
    "attention_vecmat(Tensor weights, Tensor q, Tensor k, Tensor? lse, float? scale, str backend) -> Tensor": (
        _attention_vecmat,
        _attention_vecmat_fake,
    ),
    f"maws_select(Tensor q, Tensor k, {_SELECT}) -> (Tensor, Tensor)": (_maws_select, _maws_select_fake),
    "gather_tokens(Tensor x, Tensor index, str backend) -> Tensor": (_gather_tokens, _gather_tokens_fake),
    "gather_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens, str backend) -> Tensor": (
        _gather_tokens_backward,
        _gather_tokens_backward_fake,
    ),
    "dropout(Tensor x, Tensor seed, float p, str backend) -> Tensor": (_dropout, _dropout_fake),
}


def _register_operators() -> None:
    for schema, (kernel, fake) in _OPERATORS.items():
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ffvt::{name}", fake, lib=_LIBRARY)


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, whose own products of fp32 autocast leaves alone: the public functions have cast what it asks for."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


_register_operators()
gradients.register(_LIBRARY)
flops.register()
