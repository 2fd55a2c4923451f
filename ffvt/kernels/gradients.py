"""The gradients of the registered operators: what a forward saves, and the operator that its backward calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _num_select, ctx.scale, _first_candidate, ctx.backend = inputs
    out, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*tensors, out, *others[2:])  # lse, row_max


def _attention_backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = (*ctx.saved_tensors, ctx.scale, ctx.backend)
    if len(ctx.needs_input_grad) == 5:  # qkv and four that are no tensors
        grads = (torch.ops.ffvt.maws_attention_qkvpacked_backward(grad_out, *saved),)
    else:
        grads = torch.ops.ffvt.maws_attention_backward(grad_out, *saved)
    return *grads, None, None, None, None


def _stats_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    out, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*tensors, out, *others[2:])  # lse, row_max


def _stats_backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.ffvt.maws_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.backend)
    return *grads, None, None


def _gather_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index, ctx.backend = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.ffvt.gather_tokens_backward(grad, index, ctx.num_tokens, ctx.backend), None, None


def _dropout_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.ffvt.dropout(grad, seed, ctx.p, ctx.backend), None, None, None


def _no_second_gradient(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("ffvt: the operators have a first gradient only; got a second differentiation of one")


def register(library: torch.library.Library) -> None:
    """Gives every operator of the library its gradient."""
    for name in ("maws_attention", "maws_attention_qkvpacked"):
        torch.library.register_autograd(
            f"ffvt::{name}", _attention_backward, setup_context=_attention_setup, lib=library
        )
    torch.library.register_autograd("ffvt::attention_stats", _stats_backward, setup_context=_stats_setup, lib=library)
    torch.library.register_autograd("ffvt::gather_tokens", _gather_backward, setup_context=_gather_setup, lib=library)
    torch.library.register_autograd("ffvt::dropout", _dropout_backward, setup_context=_dropout_setup, lib=library)
    for name in ("maws_attention", "maws_attention_qkvpacked", "gather_tokens"):
        torch.library.register_autograd(f"ffvt::{name}_backward", _no_second_gradient, lib=library)
