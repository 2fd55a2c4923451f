"""The Feature Fusion Vision Transformer, and the plain ViT that it extends.

Read `FFVT.forward_features_with_selection` beside figure 1 of the paper.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffvt.errors import require
from ffvt.model.config import FFVTConfig
from ffvt.model.layers import LAYER_NORM_EPS, MLP, Block, ClassBlock, PatchEmbed, PrunedSelectingBlock, SelectingBlock
from ffvt.model.selection import SelectingModel, Selection
from ffvt.model.weights import load_weights

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class ViT(nn.Module):
    """The plain Vision Transformer: its last block's class token is classified.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes). There is no loss inside.

    Raises:
        ValueError: the configuration has feature_fusion=True, which is an `FFVT`.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929).
    """

    feature_fusion: ClassVar[bool] = False

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        given, mine = config.feature_fusion, self.feature_fusion
        must = f"{mine} (ffvt.create_model makes either)"
        require(given == mine, type(self).__name__, "feature_fusion", must, given)
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.dropout = nn.Dropout(config.dropout)
        self._make_blocks(config)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, config.num_classes)
        self._init_weights()

    def _make_blocks(self, config: FFVTConfig) -> None:
        last = ClassBlock if config.prune_dead_rows else Block
        self.blocks = nn.ModuleList([*(Block(config) for _ in range(config.depth - 1)), last(config)])

    def _init_weights(self) -> None:
        """As the authors: Xavier in the MLPs, PyTorch's own in attention, a zero head. Positions start at std 0.02."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for linear in (linear for mlp in self.modules() if isinstance(mlp, MLP) for linear in (mlp.fc1, mlp.fc2)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> what `head` sees, (B, C)."""
        x = self.embed(images)  # (B, N, C)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.norm(x[:, 0])

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """An `FFVT` has it.

        Raises:
            ValueError: always, a plain ViT picks nothing.
        """
        raise ValueError("FFVT: forward_with_selection needs feature_fusion=True; got feature_fusion=False")

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.blocks)

    @property
    def recomputes(self) -> bool:
        """Whether each block runs under activation checkpointing."""
        return self.config.gradient_checkpointing and torch.is_grad_enabled()

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> class token and patches with their positions, (B, N, C)."""
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.dropout(x + self.pos_embed)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes model.safetensors and config.json into `folder` (made if missing).

        state_dict: the weights to write instead of the model's own, such as those put together from shards.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> ViT:
        """The model saved by `save_pretrained`, on the CPU; `overrides` replace fields of its configuration.

        Returns:
            An `FFVT` or a `ViT`, as the configuration says, whichever of the two is asked.

        Raises:
            FileNotFoundError: no config.json or model.safetensors there.
            ValueError: one of them does not fit.
        """
        folder = Path(folder)
        try:
            fields = json.loads((folder / CONFIG_FILE).read_text())
            config = FFVTConfig(**{**fields, **overrides})
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"from_pretrained: {folder / CONFIG_FILE} is no FFVT configuration: {error}") from error
        model = cls(config) if config.feature_fusion == cls.feature_fusion else from_config(config)
        report = load_weights(model, folder / WEIGHTS_FILE)
        incomplete = [name for name in report.left if not name.startswith("head.")]
        if incomplete:
            raise ValueError(f"from_pretrained: {folder / WEIGHTS_FILE} lacks {', '.join(incomplete[:5])}")
        return model


class FFVT(SelectingModel, ViT):
    """A ViT whose first L-1 blocks each pick K tokens; one last block fuses the class token with all of them.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes); `forward_with_selection` returns what every
    block picked too. There is no loss inside.

    Raises:
        ValueError: the configuration has feature_fusion=False, which is a `ViT`.

    Source: Wang, Yu, Gao, "Feature Fusion Vision Transformer for Fine-Grained Visual Categorization", BMVC 2021
    (arXiv 2107.02341), sections 3.1-3.2; sizes from Dosovitskiy et al., ICLR 2021.
    """

    feature_fusion: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 1

    @property
    def num_selecting(self) -> int:
        return len(self.blocks)

    @property
    def first_candidate(self) -> int:
        return self.config.first_candidate

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.blocks, self.last_block]

    def _make_blocks(self, config: FFVTConfig) -> None:
        selecting, last = (PrunedSelectingBlock, ClassBlock) if config.prune_dead_rows else (SelectingBlock, Block)
        self.blocks = nn.ModuleList([*(SelectingBlock(config) for _ in range(config.depth - 2)), selecting(config)])
        self.last_block = last(config)

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        x, picked, chosen = self.embed(images), [], []  # (B, N, C)
        for block in self.blocks:
            x, tokens, index, score = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
            picked.append(tokens)  # (B, K, C)
            chosen.append((index, score))  # (B, K), (B, N)
        x = torch.cat([x[:, :1], *picked], dim=1)  # the class token and every pick, (B, 1 + (L-1)K, C)
        x = checkpoint(self.last_block, x, use_reentrant=False) if self.recomputes else self.last_block(x)
        return self.norm(x[:, 0]), Selection.stack(chosen)


def from_config(config: FFVTConfig) -> ViT:
    """The model that a configuration names, an `FFVT` or the plain `ViT`, with initial weights."""
    return FFVT(config) if config.feature_fusion else ViT(config)


def create_model(
    name: str,
    image_size: int = 448,
    num_classes: int = 200,
    num_select: int = 12,
    feature_fusion: bool = True,
    **overrides: Any,
) -> ViT:
    """A new `FFVT` (or, with feature_fusion=False, the plain `ViT` of the same size) with initial weights.

    Args:
        name: vit_s16, vit_s14, vit_b16, vit_b32, vit_l16, vit_l32, vit_h14, r50_vit_b16, or the authors' name of one
            ("ViT-B_16"); or "timm:NAME" for a ViT of timm, without its pretrained weights.
        image_size: S, side of the square images, pixels.
        num_classes: classes of the head.
        num_select: K, tokens picked by each of the first L-1 blocks.
        feature_fusion: whether to select and fuse tokens.
        overrides: any other field of `FFVTConfig`; for timm's, of `ffvt.model.timm_models.TimmConfig`.

    Raises:
        ValueError: an unknown name or field, or a value that does not hold.
        ImportError: the hybrid, or timm's models, without timm.

    Source: FFVT (arXiv 2107.02341).
    """
    from ffvt.model.registry import config_of, model_of  # which knows this module

    sizes = {"image_size": image_size, "num_classes": num_classes, "num_select": num_select}
    return model_of(config_of(name, **sizes, feature_fusion=feature_fusion, **overrides))
