"""Attention of transformers' ViTs by our operators: `attn_implementation="ffvt"`.

    import ffvt
    ffvt.integrations.transformers.register()
    model = AutoModel.from_pretrained("facebook/dinov2-small", attn_implementation="ffvt")
    outputs = model(pixel_values, output_attentions=True)  # attentions[l]: the score of every token, (B, N)

How: transformers calls a registered function in place of its own attention. Ours never makes the (B, H, N, N) map; what
    `output_attentions` records of it is the score of every token, by MAWS or another criterion.
Limits: self-attention of models with a class token as token 0. What else the interface can ask for (masks, causality,
    dropout, grouped heads, windows, caches) is refused by name. BEiT's learned position bias is taken, by PyTorch's
    attention and for MAWS alone. An attention sees its own layer only, so the criteria rollout and psm, which read the
    layers before, and similarity, which reads the layer's output, are refused; `ffvt.add_feature_fusion` takes them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffvt.criteria import Criterion, Layer, find, pick
from ffvt.errors import as_integer, require
from ffvt.kernels.backend_torch import class_logits, select_top
from ffvt.kernels.ops import attention_stats, maws_attention
from ffvt.kernels.reference import maws_score

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError("ffvt.integrations.transformers needs transformers: pip install 'ffvt[hf]'") from error

NAME = "ffvt attention"
INSTEAD = 'attn_implementation="sdpa" computes it'
# `config.model_type` of those whose token 0 is a class token that takes part in every attention.
CLASS_TOKEN_MODELS = (
    "altclip_vision_model",
    "beit",
    "blip_2_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "clipseg_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "git_vision_model",
    "kosmos_2_vision_model",
    "metaclip_2_vision_model",
    "mlcd_vision_model",
    "owlvit_vision_model",
    "vit",
    "vit_mae",
    "vit_msn",
    "vivit",
    "yolos",
)
BIASES = ("use_relative_position_bias", "use_shared_relative_position_bias")  # fields of BEiT's config
# Arguments that say what the model returns or how its loss is averaged: nothing to the attention.
IGNORED = ("num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict")


def register(
    name: str = "ffvt",
    num_select: int = 12,
    first_candidate: int = 0,
    more_models: tuple[str, ...] = (),
    criterion: str | Criterion = "maws",
) -> None:
    """Makes `attn_implementation=name` known to transformers. Registering a name again replaces its values.

    Args:
        name: of the implementation, for `from_pretrained(..., attn_implementation=name)` and
            `model.set_attn_implementation(name)`.
        num_select: K, tokens to pick where a call does not say.
        first_candidate: tokens [0, first_candidate) are never picked, where a call does not say.
        more_models: `config.model_type` of further models whose token 0 is a class token.
        criterion: what scores the tokens, where a call does not say: maws, class_row, column, vote, ats, received or
            random (which scores every layer alike here), by name or as an object of `ffvt.criteria`.

    A call of the model can say otherwise, and can ask for the picks: `model(pixel_values, num_select=24,
    first_candidate=1, criterion="vote", selections=found)` appends (index (B, K) int64, score (B, N) fp32) of each
    layer to the list `found`. With `output_attentions=True`, `outputs.attentions` are the scores.

    Raises:
        ValueError: the name is transformers' own, a count does not hold, or the criterion is unknown, or reads more
            than one layer's attention. TypeError: a count is no integer, or the criterion is none.
        ImportError: transformers is missing.
    """
    taken = AttentionInterface._global_mapping.get(name)
    ours = taken is None or getattr(taken, "func", taken) is attend
    require(isinstance(name, str) and name.isidentifier(), "register", "name", "a plain name", name)
    require(ours and name != "eager", "register", "name", "one that transformers has not taken", name)
    num_select = as_integer("register", "num_select", num_select)
    require(num_select >= 1, "register", "num_select", "at least 1", num_select)
    first_candidate = as_integer("register", "first_candidate", first_candidate)
    require(first_candidate >= 0, "register", "first_candidate", "at least 0", first_candidate)
    models = frozenset((*CLASS_TOKEN_MODELS, *more_models))
    criterion = _of_one_layer("register", criterion)
    attention = partial(
        attend, models=models, num_select=num_select, first_candidate=first_candidate, criterion=criterion
    )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make_no_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    selections: list[tuple[Tensor, Tensor]] | None = None,
    *,
    models: frozenset[str],
    num_select: int,
    first_candidate: int,
    criterion: str | Criterion = "maws",
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention function: query, key, value (B, H, N, D) -> out (B, N, H, D), score (B, N).

    Raises:
        ValueError: something that is not computed here; the message names it.
    """
    q, k, v = _tokens_first(module, query, key, value, models, dropout, is_causal, others)
    criterion = _of_one_layer(NAME, criterion)
    fused = criterion.is_fused
    if attention_mask is not None:
        _check_bias(attention_mask, module.config)
        require(fused, NAME, "criterion", "maws where the model has a position bias", criterion.name)
        out, index, score = _biased_attention(q, k, v, attention_mask, num_select, scaling, first_candidate)
    elif fused:
        out, index, score = maws_attention(q, k, v, num_select, scaling, first_candidate)
    else:
        out, layer = _observe(module, q, k, v, scaling)
        score = criterion([layer])
        index = pick(score, num_select, first_candidate)
    if selections is not None:
        selections.append((index, score))
    return out, score


def attend_observed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    models: frozenset[str],
    observed: list[Layer],
    **others: Any,
) -> tuple[Tensor, None]:
    """As `attend`, but nothing is picked: what the attention leaves behind is appended to `observed`."""
    q, k, v = _tokens_first(module, query, key, value, models, dropout, is_causal, others)
    if attention_mask is not None:
        _refuse_mask(attention_mask)
    out, layer = _observe(module, q, k, v, scaling)
    observed.append(layer)
    return out, None


def _tokens_first(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    models: frozenset[str],
    dropout: float,
    is_causal: bool | None,
    others: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value of a call that is served, as (B, N, H, D) each."""
    _check_model(module, getattr(module, "config", None), models)
    _check_call(query, key, value, dropout, bool(getattr(module, "is_causal", False) or is_causal), others)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Layer]:
    out, stats = attention_stats(q, k, v, scale)
    prefix = num_prefix_tokens(module.config)
    return out, Layer(q.detach(), k.detach(), v.detach(), stats, scale=scale, num_prefix_tokens=prefix)


def num_prefix_tokens(config: Any) -> int:
    """P, tokens before the patches: the class token, a distillation token, registers."""
    return 1 + getattr(config, "num_register_tokens", 0) + (config.model_type == "deit")


def _of_one_layer(where: str, criterion: str | Criterion) -> Criterion:
    found = find(criterion)
    must = "maws, class_row, column, vote, ats, received or random, which read the attention of one layer alone"
    require(not found.needs_history and found.kind != "similarity", where, "criterion", must, found.name)
    return found


def make_no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """transformers' mask function: there is none to make.

    Raises:
        ValueError: the call has a mask of its own.
    """
    if attention_mask is not None:
        _refuse_mask(attention_mask)


def _refuse_mask(mask: Tensor) -> None:
    got = f"attention_mask.shape={tuple(mask.shape)}"
    raise ValueError(f"{NAME}: attention_mask must be None, no token can be left out; got {got}; {INSTEAD}")


def _check_model(module: nn.Module, config: Any, models: frozenset[str]) -> None:
    kind = getattr(config, "model_type", None)
    if kind not in models:
        raise ValueError(
            f"{NAME}: token 0 must be a class token, as in ViT, DeiT, DINOv2, DINOv3, CLIP or BEiT; got "
            f"model_type={kind!r} ({type(module).__name__}); {INSTEAD}; if its token 0 is one, "
            f"register(more_models=({kind!r},)) says so"
        )


def _check_call(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, others: dict[str, Any]
) -> None:
    if dropout:
        raise ValueError(
            f"{NAME}: attention dropout must be 0 in training; got dropout={dropout}; set attention_dropout or "
            f"attention_probs_dropout_prob of the model's config to 0"
        )
    if is_causal:
        raise ValueError(f"{NAME}: attention must not be causal; got is_causal=True; {INSTEAD}")
    if query.shape != key.shape or query.shape != value.shape:
        got = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(
            f"{NAME}: query, key and value must have one shape, there is no cross-attention, no cache and no grouped "
            f"heads; got {got}; {INSTEAD}"
        )
    given = sorted(key for key, value in others.items() if value is not None and key not in IGNORED)
    if given:
        raise ValueError(f"{NAME}: {given[0]} must be None, it is not computed here; got {', '.join(given)}; {INSTEAD}")


def _check_bias(bias: Tensor, config: Any) -> None:
    """BEiT adds its position bias by way of the mask; nothing else that comes this way is taken."""
    if not any(getattr(config, name, False) for name in BIASES) or bias.ndim != 4 or not bias.is_floating_point():
        _refuse_mask(bias)


def _biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_select: int, scale: float | None, first_candidate: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`maws_attention` of the logits scale * q kT + bias, with bias (B or 1, H or 1, N, N): the bias is a map already,
    so there is none to avoid."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=bias.to(q.dtype), scale=scale)
    row, column = class_logits(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
    with torch.no_grad():
        score = maws_score(row + bias[:, :, 0, :], column + bias[:, :, :, 0])
        index = select_top(score, num_select, first_candidate)
    return out.transpose(1, 2), index, score
