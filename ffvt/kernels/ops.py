"""The operators: public functions, schemas, fakes, gradients, and the one point where a call reaches a backend.

A public function checks its arguments and applies autocast; then it makes one registered call,
`torch.ops.ffvt.<operator>`, that autograd, `torch.compile`, `torch.export` and CUDA graphs see as one opaque node;
inside, `backends.resolve` picks the module that computes it. The forced backend travels as an argument, so that a
backward runs on the backend of its forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ffvt.kernels.backends import forced_backend, resolve
from ffvt.kernels.reference import accumulator_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LIBRARY = torch.library.Library("ffvt", "DEF")


def maws_attention(
    q: Tensor, k: Tensor, v: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that also picks the tokens with the largest mutual attention weight.

    Args:
        q, k, v: (B, N, H, D), one dtype of fp16, bf16, fp32, fp64, any strides with unit last stride. Token 0 is the
            class token. Under autocast they are cast to its dtype.
        num_select: K, how many tokens to pick, 1 <= K <= N - first_candidate.
        scale: factor of the logits; 1/sqrt(D) when None.
        first_candidate: tokens [0, first_candidate) are never picked; 0 is the authors' behaviour (the class token
            can be picked), 1 leaves out the class token.

    Returns:
        out: (B, N, H, D), dtype of q, contiguous. The only result that carries a gradient.
        index: (B, K) int64, best first; equal scores: lower index first; NaN ranks last.
        score: (B, N) fp32, mean_h softmax(S_h[0, :]) * mean_h softmax(S_h[:, 0]), of every token.

    Raises:
        ValueError: a shape, a stride or a value does not hold. TypeError: a dtype or a type does not.
        NotImplementedError: a backend forced by `use_backend` cannot serve the call.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention"
    q, k, v = _prepare(name, q=q, k=k, v=v)
    _check_heads(name, {"q": q, "k": k, "v": v}, "(B, N, H, D)")
    scale = _check_selection(name, q.shape[1], q.shape[3], num_select, scale, first_candidate)
    out, index, score, _ = torch.ops.ffvt.maws_attention(q, k, v, num_select, scale, first_candidate, forced_backend())
    return out, index, score


def maws_attention_qkvpacked(
    qkv: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`maws_attention` on packed q, k, v: no copy on the way in, one packed gradient on the way out.

    Args:
        qkv: (B, N, 3, H, D), fp16, bf16, fp32 or fp64, any strides with unit last stride: the view of one linear
            layer's output.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        out (B, N, H, D), index (B, K) int64, score (B, N) fp32, as `maws_attention`. Only out carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_attention_qkvpacked"
    (qkv,) = _prepare(name, qkv=qkv)
    _check_heads(name, {"qkv": qkv}, "(B, N, 3, H, D)")
    if qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must be (B, N, 3, H, D); got qkv.shape={tuple(qkv.shape)}")
    scale = _check_selection(name, qkv.shape[1], qkv.shape[4], num_select, scale, first_candidate)
    out, index, score, _ = torch.ops.ffvt.maws_attention_qkvpacked(
        qkv, num_select, scale, first_candidate, forced_backend()
    )
    return out, index, score


def maws_select(
    q: Tensor, k: Tensor, num_select: int, scale: float | None = None, first_candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """The picks of `maws_attention` without the attention: two thin products per head.

    Args:
        q, k: (B, N, H, D), as for `maws_attention`.
        num_select, scale, first_candidate: as for `maws_attention`.

    Returns:
        index: (B, K) int64, best first. score: (B, N) fp32. Neither carries a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maws_attention`.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "maws_select"
    q, k = (tensor.detach() for tensor in _prepare(name, q=q, k=k))
    _check_heads(name, {"q": q, "k": k}, "(B, N, H, D)")
    scale = _check_selection(name, q.shape[1], q.shape[3], num_select, scale, first_candidate)
    return torch.ops.ffvt.maws_select(q, k, num_select, scale, first_candidate, forced_backend())


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Picks tokens: row index[b, i] of image b.

    Args:
        x: (B, N, C), fp16, bf16, fp32 or fp64.
        index: (B, K) int64, each in [0, N). The picks of one image are usually distinct; a repeated one receives the
            sum of its gradients.

    Returns:
        (B, K, C), dtype of x, contiguous. Carries a gradient to x.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: x is not floating point, index not int64.
        IndexError: an index outside [0, N) (CPU tensors; on a GPU it is not read back: the kernel gives a row of NaN).

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "gather_tokens"
    _check_tensors(name, x=x, index=index)
    _check_dtype(name, "x", x)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: index must be int64; got index.dtype={index.dtype}")
    if x.ndim != 3 or index.ndim != 2 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f"{name}: x must be (B, N, C) and index (B, K); got x.shape={tuple(x.shape)}, "
            f"index.shape={tuple(index.shape)}"
        )
    _check_device(name, {"x": x, "index": index})
    return torch.ops.ffvt.gather_tokens(x, index, forced_backend())


def _prepare(name: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast says."""
    _check_tensors(name, **tensors)
    return _autocast(*tensors.values())


def _check_tensors(name: str, **tensors: Tensor) -> None:
    """Refuses what is no tensor, and tangents, which would be lost without a word."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor; got {key}={tensor!r}")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: {key} must have no tangent, there is no forward-mode gradient; got one")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: {argument} must be one of {names}; got {argument}.dtype={tensor.dtype}")


def _check_device(name: str, tensors: dict[str, Tensor]) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{key}.device={t.device}" for key, t in tensors.items())
        raise ValueError(f"{name}: all tensors must be on one device; got {got}")


def _check_heads(name: str, tensors: dict[str, Tensor], layout: str) -> None:
    (argument, first), *others = tensors.items()
    for key, tensor in tensors.items():
        _check_dtype(name, key, tensor)
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
    _check_device(name, tensors)


def _check_selection(
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


# Registered operators. Each function below is the kernel of every device: it hands over to the backend's module.


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
