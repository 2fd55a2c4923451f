"""A ViT of transformers becomes an FFVT, all its parts kept; `transformers.Trainer` takes it as it is.

How: each of the first L-1 layers runs as transformers wrote it, with an attention that also selects, or leaves behind
what another criterion than MAWS reads (`integrations/transformers.py`). So LayerScale, registers, gated MLPs,
stochastic depth, rotary positions and transformers' activation checkpointing need no code here; only the fusion layer,
whose tokens come from many places, needs its rotary table gathered.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import ImageClassifierOutput

from ffvt.criteria import Criterion, find
from ffvt.errors import as_integer, require
from ffvt.integrations.transformers import CLASS_TOKEN_MODELS, attend, attend_observed, num_prefix_tokens
from ffvt.kernels.ops import gather_tokens
from ffvt.model.selection import Picker, SelectingModel, Selection

NAME = "add_feature_fusion"
IMPLEMENTATION = "ffvt_fusion"  # of the attention of a fused model


class Family(NamedTuple):
    """Where the models of one `config.model_type` have their parts."""

    layers: str
    norm: str
    norm_before: str = ""
    rope: str = ""


FAMILIES = {
    "clip_vision_model": Family("encoder.layers", "post_layernorm", norm_before="pre_layrnorm"),
    "deit": Family("layers", "layernorm"),
    "dinov2": Family("encoder.layer", "layernorm"),
    "dinov2_with_registers": Family("encoder.layer", "layernorm"),
    "dinov3_vit": Family("model.layer", "norm", rope="rope_embeddings"),
    "metaclip_2_vision_model": Family("encoder.layers", "post_layernorm", norm_before="pre_layrnorm"),
    "vit": Family("layers", "layernorm"),
    "vit_msn": Family("layers", "layernorm"),
}


class FusedTransformer(SelectingModel):
    """A ViT of transformers turned into an FFVT by `add_feature_fusion`; `forward` is as in transformers' classifiers.

    The ViT is `vit`; its own forward keeps working.
    """

    def __init__(
        self, vit: PreTrainedModel, num_select: int, num_classes: int, first_candidate: int, criterion: Criterion
    ) -> None:
        super().__init__()
        self.vit, self.family = vit, FAMILIES[vit.config.model_type]
        self.num_select, self.first_candidate, self.criterion = num_select, first_candidate, criterion
        norm = attrgetter(self.family.norm)(vit).weight
        self.head = nn.Linear(vit.config.hidden_size, num_classes, device=norm.device, dtype=norm.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def num_selecting(self) -> int:
        return len(attrgetter(self.family.layers)(self.vit)) - 1

    @property
    def num_prefix_tokens(self) -> int:
        return num_prefix_tokens(self.vit.config)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: (B, 3, S, S), floating point.
            labels: (B,) int64, or None.

        Returns:
            logits (B, num_classes) and, with labels, loss: the mean cross-entropy.
        """
        logits = self.head(self.forward_features(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Recomputes each layer in the backward instead of keeping its activations; takes what transformers' takes."""
        self.vit.activation_checkpointing_enable(*args, **options)

    def activation_checkpointing_disable(self) -> None:
        self.vit.activation_checkpointing_disable()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the other models of this package have it."""
        self.activation_checkpointing_enable() if enable else self.activation_checkpointing_disable()

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        if not images.is_floating_point():
            raise TypeError(f"{NAME}: pixel_values must be floating point, normalised; got dtype={images.dtype}")
        *layers, last_layer = attrgetter(self.family.layers)(self.vit)
        x, rope = self._embed(images)  # (B, N, C)
        num_tokens = x.shape[1]
        recomputes = self.training and self.vit.is_gradient_checkpointing
        picker = Picker(self.criterion, self.num_select, self.first_candidate, recomputes=recomputes)
        patch = self.vit.config.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        for number, layer in enumerate(layers):
            if self.criterion.is_fused:
                asked = {"num_select": self.num_select, "first_candidate": self.first_candidate}
                x, (index, score) = self._run(layer, x, "selections", {**rope, **asked})
                picker.take(gather_tokens(x, index), index, score)
            else:
                x, observed = self._run(layer, x, "observed", rope)
                picker.judge(x, observed._replace(number=number, grid=grid))
        selection = picker.selection()
        rope = _rope_of(F.pad(selection.index.flatten(1), (1, 0)), rope, num_tokens)
        x = last_layer(picker.fused(x), attention_mask=None, **rope)
        return attrgetter(self.family.norm)(self.vit)(x[:, 0]), selection

    def _run(self, layer: nn.Module, x: Tensor, answer: str, given: dict[str, Any]) -> tuple[Tensor, Any]:
        """One layer as transformers wrote it: x (B, N, C), and what its attention puts into the list `answer`."""
        answers: list[Any] = []
        x = layer(x, attention_mask=None, **{answer: answers}, **given)
        if len(answers) != 1:
            got = f"{len(answers)} selections with attn_implementation={self.vit.config._attn_implementation!r}"
            raise ValueError(f"{NAME}: attn_implementation must stay {IMPLEMENTATION!r}; got {got}")
        return x, answers.pop()  # out of the list, which activation checkpointing keeps until the backward

    def _embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Tokens (B, N, C), and what every layer is given beside them: the rotary table, if there is one."""
        images = images.to(attrgetter(self.family.norm)(self.vit).weight.dtype)
        x = self.vit.embeddings(images)
        x = attrgetter(self.family.norm_before)(self.vit)(x) if self.family.norm_before else x
        rope = {"position_embeddings": getattr(self.vit, self.family.rope)(images)} if self.family.rope else {}
        return x, rope


def _rope_of(index: Tensor, rope: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The rotary table (cosine, sine), each (N-P, D), of tokens index (B, M): each (B, 1, M, D).

    The P prefix tokens (class token, registers) are not rotated: cosine 1, sine 0.
    """
    if not rope:
        return {}
    cosine, sine = rope["position_embeddings"]
    prefix = (0, 0, num_tokens - cosine.shape[0], 0)
    table = (F.pad(cosine, prefix, value=1.0), F.pad(sine, prefix))
    return {"position_embeddings": tuple(part[index].unsqueeze(1) for part in table)}


def add_feature_fusion(
    model: PreTrainedModel,
    num_select: int = 12,
    num_classes: int | None = None,
    first_candidate: int = 0,
    criterion: str | Criterion = "maws",
) -> FusedTransformer:
    """`ffvt.add_feature_fusion` of a model of transformers.

    Taken: ViT, DeiT, DINOv2 (with registers), DINOv3, ViT-MSN, CLIP's and MetaCLIP 2's vision model, alone or inside a
    model with a head or a text model. Refused: models without a class token (SigLIP, I-JEPA), with position biases
    (BEiT), that hide patches (ViT-MAE); attention dropout. There is no token reduction: every token stays to the end.

    Args:
        model: the model. It is used, not copied: its vision part loses the pooler, its mask token is frozen, and
            `attn_implementation` becomes "ffvt_fusion", which is "sdpa" for the model's own forward.
        num_select, num_classes, first_candidate, criterion: as for `ffvt.add_feature_fusion`.

    Raises:
        TypeError: not a transformers model, a count is no integer, or the criterion is none.
        ValueError: a model of the refused kinds, fewer than two layers, or a value that does not hold.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{NAME}: model must be a model of transformers; got {type(model).__name__}")
    vit = _vision_part(model)
    config = vit.config
    num_classes = model.config.num_labels if num_classes is None else num_classes
    num_select = as_integer(NAME, "num_select", num_select)
    num_classes = as_integer(NAME, "num_classes", num_classes)
    first_candidate = as_integer(NAME, "first_candidate", first_candidate)
    criterion = find(criterion)
    depth = len(attrgetter(FAMILIES[config.model_type].layers)(vit))
    require(depth >= 2, NAME, "num_hidden_layers", "at least 2", depth)
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        rate = getattr(config, name, 0.0)
        require(rate == 0, NAME, name, "0, attention dropout is not supported", rate)
    require(num_select >= 1, NAME, "num_select", "at least 1", num_select)
    require(num_classes >= 1, NAME, "num_classes", "at least 1", num_classes)
    require(first_candidate >= 0, NAME, "first_candidate", "at least 0", first_candidate)
    _register()
    vit.set_attn_implementation(IMPLEMENTATION)
    vit.pooler = None  # our head takes its place, on the class token: no parameter without a gradient stays
    if getattr(vit.embeddings, "mask_token", None) is not None:
        vit.embeddings.mask_token.requires_grad_(False)
    return FusedTransformer(vit, num_select, num_classes, first_candidate, criterion)


def _vision_part(model: PreTrainedModel) -> PreTrainedModel:
    parts = (model, model.base_model, getattr(model, "vision_model", None))
    for part in parts:
        kind = getattr(getattr(part, "config", None), "model_type", None)
        if kind in FAMILIES and hasattr(part, "embeddings"):
            return part
    known = ", ".join(FAMILIES)
    raise ValueError(f"{NAME}: model must be one of {known}; got model_type={model.config.model_type!r}")


def _register() -> None:
    models = frozenset(CLASS_TOKEN_MODELS)
    select, observe = partial(attend, models=models), partial(attend_observed, models=models)

    def attend_or_select(
        *args: Any, selections: Any = None, observed: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Selects, or is observed, where the fused model asks for it; else the attention that transformers takes by
        default."""
        if observed is not None:
            return observe(*args, observed=observed, **kwargs)
        if selections is not None:
            return select(*args, selections=selections, **kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(IMPLEMENTATION, attend_or_select)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
