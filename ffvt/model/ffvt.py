"""The Feature Fusion Vision Transformer. Read `FFVT.forward_with_selection` beside figure 1 of the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.layers import LAYER_NORM_EPS, MLP, Attention, Block, PatchEmbed, SelectingBlock
from ffvt.model.weights import load_weights

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class Selection(NamedTuple):
    """What the first L-1 blocks picked: index (B, L-1, K) int64, best first; score (B, L-1, N) fp32."""

    index: Tensor
    score: Tensor


class FFVT(nn.Module):
    """A ViT whose first L-1 blocks each pick K tokens; one last block fuses the class token with all of them.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes). There is no loss inside.

    Source: Wang, Yu, Gao, "Feature Fusion Vision Transformer for Fine-Grained Visual Categorization", BMVC 2021
    (arXiv 2107.02341), sections 3.1-3.2; sizes from Dosovitskiy et al., ICLR 2021.
    """

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.dropout = nn.Dropout(config.dropout)
        if config.feature_fusion:
            self.blocks = nn.ModuleList(SelectingBlock(config) for _ in range(config.depth - 1))
            self.last_block = Block(config, self._attention())
        else:
            self.blocks = nn.ModuleList(Block(config, self._attention()) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, config.num_classes)
        self._init_weights()

    def _attention(self) -> Attention:
        return Attention(self.config.embed_dim, self.config.num_heads, self.config.qkv_bias)

    def _init_weights(self) -> None:
        """As the authors: Xavier in the MLPs, PyTorch's own in attention, a zero head. Positions start at std 0.02."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for linear in (linear for mlp in self.modules() if isinstance(mlp, MLP) for linear in (mlp.fc1, mlp.fc2)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self._classify(images)[0]

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """Logits (B, num_classes) and what every block picked.

        Raises:
            ValueError: the model is a plain ViT (feature_fusion=False) and picks nothing, or the images do not fit.
        """
        if not self.config.feature_fusion:
            raise ValueError("FFVT: forward_with_selection needs feature_fusion=True; got feature_fusion=False")
        logits, picks = self._classify(images)
        index, score = zip(*picks)
        return logits, Selection(torch.stack(index, 1), torch.stack(score, 1))

    def _classify(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, picks = self.embed(images), []
        if self.config.feature_fusion:
            x, picks = self._select_and_fuse(x)
            last_block = self.last_block
        else:
            *blocks, last_block = self.blocks
            for block in blocks:
                x = self._run(block, x)
        class_token = self._run(last_block, x, self.config.prune_dead_rows)[:, 0]
        return self.head(self.norm(class_token)), picks

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> class token and patches with their positions, (B, N, C)."""
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.dropout(x + self.pos_embed)

    def _select_and_fuse(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All blocks but the last: (B, N, C) -> the class token and every pick, (B, 1 + (L-1)K, C)."""
        picked, picks = [], []
        for block in self.blocks:
            selected_only = block is self.blocks[-1] and self.config.prune_dead_rows
            x, tokens, index, score = self._run(block, x, selected_only)
            picked.append(tokens)
            picks.append((index, score))
        return torch.cat([x[:, :1], *picked], dim=1), picks

    def _run(self, block: Block, x: Tensor, needed_only: bool = False) -> Any:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, needed_only, use_reentrant=False)
        return block(x, needed_only)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes model.safetensors and config.json into `folder` (made if missing).

        state_dict: the weights to write instead of the model's own, such as those put together from shards.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> FFVT:
        """The model saved by `save_pretrained`, on the CPU; `overrides` replace fields of its configuration.

        Raises:
            FileNotFoundError: no config.json or model.safetensors there. ValueError: one of them does not fit.
        """
        folder = Path(folder)
        try:
            fields = json.loads((folder / CONFIG_FILE).read_text())
            config = FFVTConfig(**{**fields, **overrides})
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"from_pretrained: {folder / CONFIG_FILE} is no FFVT configuration: {error}") from error
        model = cls(config)
        report = load_weights(model, folder / WEIGHTS_FILE)
        incomplete = [name for name in report.left if not name.startswith("head.")]
        if incomplete:
            raise ValueError(f"from_pretrained: {folder / WEIGHTS_FILE} lacks {', '.join(incomplete[:5])}")
        return model


def create_model(
    name: str,
    image_size: int = 448,
    num_classes: int = 200,
    num_select: int = 12,
    feature_fusion: bool = True,
    **overrides: Any,
) -> FFVT:
    """A new FFVT (or, with feature_fusion=False, the plain ViT of the same size) with initial weights.

    Args:
        name: vit_s16, vit_s14, vit_b16, vit_b32, vit_l16, vit_l32, vit_h14, r50_vit_b16, or the authors' name of one
            ("ViT-B_16").
        image_size: S, pixels. num_classes: classes. num_select: K, tokens picked per block.
        overrides: any other field of `FFVTConfig`.

    Raises:
        ValueError: an unknown name or field, or a value that does not hold. ImportError: the hybrid without timm.

    Source: FFVT (arXiv 2107.02341).
    """
    sizes = {"image_size": image_size, "num_classes": num_classes, "num_select": num_select}
    return FFVT(make_config(name, **sizes, feature_fusion=feature_fusion, **overrides))
