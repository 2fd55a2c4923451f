"""What models made of a timm ViT have in common: timm's hooks, handed through under the names that training sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffvt.errors import require
from ffvt.model.ffvt import ViT

if TYPE_CHECKING:
    from ffvt.model.timm_models import TimmConfig

EXTRA = "pip install 'ffvt[timm]'"


class OfTimm(nn.Module):
    """A model around a timm ViT, `vit`. Parameters are named vit.<timm's name>, and head.<...> if the head is ours.

    Attributes:
        vit: the timm ViT.
        config: what it was made of by name, which `save_pretrained` writes; None for a ViT that somebody else made.
        num_classes: of the head.
    """

    vit: nn.Module
    config: TimmConfig | None = None
    num_classes: int

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.vit.blocks)

    @property
    def embed_dim(self) -> int:
        return self.vit.embed_dim

    num_features = head_hidden_size = embed_dim

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's facts of the pretrained weights, with this model's own input size, classes and names of parameters."""
        facts = dict(getattr(self.vit, "pretrained_cfg", None) or {})
        for name in ("test_input_size", "test_crop_pct"):  # of the weights' own size, not of this model's
            facts.pop(name, None)
        size = self.vit.patch_embed.img_size
        facts |= {"num_classes": self.num_classes, "classifier": "head", "first_conv": "vit.patch_embed.proj"}
        return facts | ({"input_size": (3, *size)} if size else {})

    default_cfg = pretrained_cfg

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves out."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the parameters by name, for timm's layer-wise learning-rate decay."""

        def renamed(pattern: str) -> str:
            return rf"^vit\.(?:{pattern.replace('^', '')})"

        matcher = self.vit.group_matcher(coarse)
        return {
            name: renamed(found) if isinstance(found, str) else [(renamed(pattern), order) for pattern, order in found]
            for name, found in matcher.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each block is recomputed in the backward instead of keeping its activations."""
        self.vit.set_grad_checkpointing(enable)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes model.safetensors and config.json into `folder`, which `ffvt.load_pretrained` reads.

        Raises:
            ValueError: the ViT was made by somebody else, so nobody knows how to make it again. Its state dict can be
                saved as any other.
        """
        must = "known: the model must be made by name (ffvt.create_model('timm:NAME'))"
        require(self.config is not None, "save_pretrained", "config", must, None)
        ViT.save_pretrained(self, folder, state_dict)

    def _renew_config(self) -> None:
        """After a change of the head; a model without one is no longer what a name makes."""
        if self.config is not None:
            changed = dataclasses.replace(self.config, num_classes=self.num_classes) if self.num_classes else None
            self.config = changed


class TimmViT(OfTimm):
    """A timm ViT as timm made it: what is trained without feature fusion."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    @property
    def num_classes(self) -> int:
        return self.vit.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        return self.vit.num_prefix_tokens

    def forward(self, images: Tensor, need_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if not need_features:
            return self.vit(images)
        tokens = self.vit.forward_features(images)
        return self.vit.forward_head(tokens), self.vit.forward_head(tokens, pre_logits=True)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> what the head sees, (B, C); a distilled model has two heads, and this is the mean of
        what they see. `vit.forward_features` gives all tokens."""
        return self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives, (B, C) -> logits (B, num_classes); the features themselves with pre_logits.

        Raises:
            ValueError: the model has two heads, and the mean of what they see does not tell their logits.
        """
        if pre_logits:
            return features
        head = self.get_classifier()
        must = "one module (vit.forward_head takes what vit.forward_features gives)"
        require(isinstance(head, nn.Module), "forward_head", "head", must, type(head).__name__)
        return head(features)

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Any]:
        """A fused model has it.

        Raises:
            ValueError: always, a plain ViT picks nothing.
        """
        return ViT.forward_with_selection(self, images)

    def get_classifier(self) -> nn.Module:
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.vit.reset_classifier(num_classes, global_pool)
        self._renew_config()


def check_is_vit(where: str, name: str, model: nn.Module) -> None:
    """Refuses what is no timm ViT of the kinds that are served.

    Raises:
        TypeError: it is something else. ImportError: timm is missing.
    """
    try:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError(f"{where} needs timm: {EXTRA}") from error
    if not isinstance(model, (VisionTransformer, Eva)):
        raise TypeError(f"{where}: {name} must be a timm VisionTransformer or Eva; got {type(model).__name__}")
