"""The attention of a timm block, made to select, or to leave behind what a selection reads.

A timm attention keeps its code; its one call of scaled_dot_product_attention is served by `maws_attention` or by
`attention_stats`. What is replaced is the class of the module, once. So the same operators run whoever calls a block:
the model's forward, timm's own `forward_features`, or the recomputation of activation checkpointing, which runs in the
backward.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffvt.criteria import Layer
from ffvt.kernels.ops import attention_stats, maws_attention

NAME = "add_feature_fusion"
# .request: of the block that runs in this thread, if there is one; .observers: who else looks on
_thread = threading.local()


class SelectionRequest:
    """Within this context, the attention that runs in this thread answers: a `Selecting` one with its picks, index
    (B, K) and score (B, N), an `Observed` one with its `Layer`."""

    def __init__(self, num_select: int = 1, first_candidate: int = 0) -> None:
        self.num_select, self.first_candidate = num_select, first_candidate
        self.answers: list[Any] = []

    def __enter__(self) -> SelectionRequest:
        self.outer = getattr(_thread, "request", None)
        _thread.request = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        _thread.request = self.outer

    def answer(self) -> Any:
        """What the attention answered.

        Raises:
            ValueError: the attention has not called scaled_dot_product_attention exactly once.
        """
        if len(self.answers) != 1:
            raise ValueError(
                f"{NAME}: every attention must call scaled_dot_product_attention once; got {len(self.answers)} calls"
            )
        return self.answers[0]


@contextmanager
def observed_selections(observe: Callable[[Tensor, Tensor, float | None], None]) -> Iterator[None]:
    """Within this context, in this thread, attention that answers tells `observe` its query, key (B, H, N, D), scale.

    It is served by our operator, so nobody else can see a call of scaled_dot_product_attention.
    """
    outer = getattr(_thread, "observers", ())
    _thread.observers = (*outer, observe)
    try:
        yield
    finally:
        _thread.observers = outer


class _SDPA(TorchFunctionMode):
    """Within this context, scaled_dot_product_attention is `attend`."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def given_options(
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, bool]:
    """Which arguments of scaled_dot_product_attention, after q, k and v, make it another attention than ours."""
    return {
        "attn_mask": attn_mask is not None,
        "dropout_p": bool(dropout_p),
        "is_causal": bool(is_causal),
        "enable_gqa": bool(enable_gqa),
    }


def _attend_and_answer(
    operator: Callable[..., tuple[Tensor, Any]], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """scaled_dot_product_attention by one of our operators: (B, H, N, D) each.

    Without a request (timm's own forward, or a recomputation in the backward) the answer is dropped, so that a
    recomputation meets the operator of its forward.
    """
    request = getattr(_thread, "request", None)
    refused = [name for name, is_given in given_options(*args, **kwargs).items() if is_given]
    if refused and request is None:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    if refused:
        raise NotImplementedError(
            f"{NAME}: scaled_dot_product_attention must be called without mask, dropout, causality and grouped heads; "
            f"got {', '.join(refused)}"
        )
    request, scale = request or SelectionRequest(), kwargs.get("scale")
    for observe in getattr(_thread, "observers", ()):
        observe(query, key, scale)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out, answer = operator(request, q, k, v, scale)
    request.answers.append(answer)
    return out.transpose(1, 2)


def _select(
    request: SelectionRequest, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    out, index, score = maws_attention(q, k, v, request.num_select, scale, request.first_candidate)
    return out, (index, score)


def _observe(request: SelectionRequest, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Layer]:
    out, stats = attention_stats(q, k, v, scale)
    return out, Layer(q.detach(), k.detach(), v.detach(), stats, scale=scale)


def _rotate_and_attend(
    rope: Tensor, half: bool, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """scaled_dot_product_attention after the rotation of every token but the first: rope (B, H or 1, N-1, E)."""
    from timm.layers import apply_rot_embed_cat

    query, key = (
        torch.cat([t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], rope, half=half)], dim=2).type_as(value)
        for t in (query, key)
    )
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


class Role:
    """Mixed into the class of a timm attention, by `give_role`."""

    role: type[Role]
    plain: type[nn.Module]  # timm's class

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (self.role, self.plain), self.__dict__  # pickle cannot find a class that was made here


class Selecting(Role):
    """The attention of one of the first L-1 blocks, which picks by itself."""

    operator = staticmethod(_select)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with _SDPA(functools.partial(_attend_and_answer, self.operator)):
            return super().forward(*args, **kwargs)


class Observed(Selecting):
    """The attention of one of the first L-1 blocks, which leaves its statistics behind."""

    operator = staticmethod(_observe)


class Fusing(Role):
    """The attention of the last block of a ViT with registers and rotary positions.

    timm rotates none of the first P = num_prefix_tokens tokens. Of the fused tokens only the first is the class token,
    so there the rotation happens in the call of scaled_dot_product_attention.
    """

    def forward(self, x: Tensor, rope: Tensor | None = None, **options: Any) -> Tensor:
        if rope is None or x.shape[1] - rope.shape[-2] == self.num_prefix_tokens:
            return super().forward(x, rope=rope, **options)
        with _SDPA(functools.partial(_rotate_and_attend, rope, getattr(self, "rotate_half", False))):
            return super().forward(x, **options)


@functools.cache
def _class_with_role(role: type[Role], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"{role.__name__}{plain.__name__}", (role, plain), {"role": role, "plain": plain})


def give_role(attention: nn.Module, role: type[Role] | None) -> None:
    """Changes the class of a timm attention to one with the role, or back to timm's."""
    plain = attention.plain if isinstance(attention, Role) else type(attention)
    attention.__class__ = plain if role is None else _class_with_role(role, plain)


def _restore(role: type[Role], plain: type[nn.Module]) -> nn.Module:
    made = _class_with_role(role, plain)
    return made.__new__(made)


def check_attention(attention: nn.Module, like: Tensor) -> None:
    """Runs a copy of a timm attention on two tokens of zeros, to see whether it can select.

    like: the class token (1, 1, C), for width, dtype and device.

    Raises:
        ValueError: it cannot; the message says why.
    """
    trial = copy.deepcopy(attention).eval()
    trial.fused_attn = True
    give_role(trial, Selecting)
    try:
        with torch.no_grad(), SelectionRequest() as request:
            trial.forward(like.new_zeros(1, 2, like.shape[-1]))
    except Exception as error:  # of a class that nobody here knows: one kind goes out, with the cause in it
        raise ValueError(
            f"{NAME}: every attention must call scaled_dot_product_attention on q, k, v of one shape; "
            f"got a {type(attention).__name__}: {error}"
        ) from error
    request.answer()
