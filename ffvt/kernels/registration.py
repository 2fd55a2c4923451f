"""The registered operators `torch.ops.ffvt.*`: schemas, kernels, fakes and gradients.

A registered kernel asks `backends.resolve` for the module that serves the call. The forced backend travels as an
argument, so that a backward runs on the backend of its forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffvt.kernels.backends import resolve
from ffvt.kernels.reference import accumulator_dtype

_LIBRARY = torch.library.Library("ffvt", "DEF")


def _maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = resolve("maws_attention", backend, q, k, v)
    return module.maws_attention_forward(q, k, v, num_select, scale, first_candidate)


def _maws_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    index, score = _maws_select_fake(q, k, num_select, scale, first_candidate, backend)
    return q.new_empty(q.shape), index, score, q.new_empty(batch, heads, tokens, dtype=accumulator_dtype(q.dtype))


def _maws_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    module = resolve("maws_attention", backend, q, k, v)
    module.maws_attention_backward(grad_out, q, k, v, out, lse, scale, grads)
    return grads


def _maws_attention_backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    module = resolve("maws_attention_qkvpacked", backend, q, k, v)
    return module.maws_attention_forward(q, k, v, num_select, scale, first_candidate)


def _maws_attention_qkvpacked_fake(
    qkv: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _maws_attention_fake(*qkv.unbind(2), num_select, scale, first_candidate, backend)


def _maws_attention_qkvpacked_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> Tensor:
    q, k, v = qkv.unbind(2)
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    module = resolve("maws_attention_qkvpacked", backend, q, k, v)
    module.maws_attention_backward(grad_out, q, k, v, out, lse, scale, grad.unbind(2))
    return grad


def _maws_attention_qkvpacked_backward_fake(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor]:
    return resolve("maws_select", backend, q, k).maws_select_forward(q, k, num_select, scale, first_candidate)


def _maws_select_fake(
    q: Tensor, k: Tensor, num_select: int, scale: float, first_candidate: int, backend: str
) -> tuple[Tensor, Tensor]:
    batch, tokens = q.shape[:2]
    return q.new_empty(batch, num_select, dtype=torch.int64), q.new_empty(batch, tokens, dtype=torch.float32)


def _gather_tokens(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return resolve("gather_tokens", backend, x, index).gather_tokens_forward(x, index)


def _gather_tokens_fake(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int, backend: str) -> Tensor:
    return resolve("gather_tokens", backend, grad, index).gather_tokens_backward(grad, index, num_tokens)


def _gather_tokens_backward_fake(grad: Tensor, index: Tensor, num_tokens: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


_SELECT = "int num_select, float scale, int first_candidate, str backend"
_HEADS = "Tensor q, Tensor k, Tensor v"
_OPERATORS = {
    f"maws_attention({_HEADS}, {_SELECT}) -> (Tensor, Tensor, Tensor, Tensor)": (_maws_attention, _maws_attention_fake),
    f"maws_attention_backward(Tensor grad_out, {_HEADS}, Tensor out, Tensor lse, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)": (_maws_attention_backward, _maws_attention_backward_fake),
    f"maws_attention_qkvpacked(Tensor qkv, {_SELECT}) -> (Tensor, Tensor, Tensor, Tensor)": (
        _maws_attention_qkvpacked,
        _maws_attention_qkvpacked_fake,
    ),
    "maws_attention_qkvpacked_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale, str backend)"
    " -> Tensor": (_maws_attention_qkvpacked_backward, _maws_attention_qkvpacked_backward_fake),
    f"maws_select(Tensor q, Tensor k, {_SELECT}) -> (Tensor, Tensor)": (_maws_select, _maws_select_fake),
    "gather_tokens(Tensor x, Tensor index, str backend) -> Tensor": (_gather_tokens, _gather_tokens_fake),
    "gather_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens, str backend) -> Tensor": (
        _gather_tokens_backward,
        _gather_tokens_backward_fake,
    ),
}


def _register_operators() -> None:
    for schema, (kernel, fake) in _OPERATORS.items():
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ffvt::{name}", fake, lib=_LIBRARY)


def _attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _num_select, ctx.scale, _first_candidate, ctx.backend = inputs
    out, index, score, lse = output
    ctx.mark_non_differentiable(index, score, lse)
    ctx.save_for_backward(*tensors, out, lse)


def _attention_backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if len(tensors) == 3:  # qkv, out, lse
        grads = (torch.ops.ffvt.maws_attention_qkvpacked_backward(grad_out, *tensors, ctx.scale, ctx.backend),)
    else:  # q, k, v, out, lse
        grads = torch.ops.ffvt.maws_attention_backward(grad_out, *tensors, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


def _gather_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index, ctx.backend = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.ffvt.gather_tokens_backward(grad, index, ctx.num_tokens, ctx.backend), None, None


def _no_second_gradient(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("ffvt: the operators have a first gradient only; got a second differentiation of one")


def _register_gradients() -> None:
    for name in ("maws_attention", "maws_attention_qkvpacked"):
        torch.library.register_autograd(
            f"ffvt::{name}", _attention_backward, setup_context=_attention_setup, lib=_LIBRARY
        )
    torch.library.register_autograd("ffvt::gather_tokens", _gather_backward, setup_context=_gather_setup, lib=_LIBRARY)
    for name in ("maws_attention", "maws_attention_qkvpacked", "gather_tokens"):
        torch.library.register_autograd(f"ffvt::{name}_backward", _no_second_gradient, lib=_LIBRARY)


_register_operators()
_register_gradients()
