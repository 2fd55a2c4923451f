"""TransFG: each head's most attended patch, through all layers, goes into one last layer beside the class token.

What: the authors multiply the maps of the first L-1 layers, head by head, and read row 0 of the product. Here that row
    is carried through the layers, last layer first, a vector times a map at a time: the same row, and no map.
Memory: of each layer q, k and lse until the parts are picked. Where a backward keeps them anyway they are views of it;
    elsewhere copies, which let go of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffvt.criteria import Layer, pick, psm
from ffvt.kernels.ops import gather_tokens
from ffvt.model.config import FFVTConfig
from ffvt.model.ffvt import ViT
from ffvt.model.layers import Attention, Block, ClassBlock, ObservedBlock
from ffvt.model.selection import SelectingModel, Selection


class TransFG(SelectingModel, ViT):
    """A ViT whose last layer sees the class token and one patch per head, picked from the maps of all layers before.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes). `forward_with_selection` returns the picks
    too: `selection.index` (B, H) int64, the part of each head, counted as tokens (1 is the first patch), and
    `selection.score` (B, H, N) fp32, row 0 of the product of each head's maps. There is no loss inside: the authors'
    is cross entropy of the logits plus `ffvt.contrastive_loss` of the features.

    `blocks` are the first L-1 layers, `last_block` the authors' part layer, `norm` and `head` their part norm and head.
    Several heads may pick one patch. Only the features carry a gradient.

    Raises:
        ValueError: the configuration is of another kind, a `ViT` or an `FFVT`.

    Source: He et al., "TransFG: A Transformer Architecture for Fine-Grained Recognition", AAAI 2022 (arXiv 2103.07976),
    section 3.
    """

    kind: ClassVar[str] = "transfg"
    num_prefix_tokens: ClassVar[int] = 1
    first_candidate: ClassVar[int] = 1

    @property
    def num_selecting(self) -> int:
        """The heads, each of which picks."""
        return self.config.num_heads

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.blocks, self.last_block]

    def _make_blocks(self, config: FFVTConfig) -> None:
        picking, last = (PrunedPartBlock, ClassBlock) if config.prune_dead_rows else (PartBlock, Block)
        kinds = [*[ObservedBlock] * (config.depth - 2), picking]
        self.blocks = nn.ModuleList(kind(config) for kind in kinds)
        self.last_block = last(config)

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        *observed, picking = self.blocks
        x, layers = self.embed(images), []  # (B, N, C)
        views = torch.is_grad_enabled() and not self.recomputes
        for block in observed:
            x, layer = self.run(block, x)
            layers.append(layer.kept(views))
        x, *selection = picking(x, layers)  # (B, 1 + H, C); under checkpointing it would keep the layers, to pick again
        x = self.run(self.last_block, x)
        return self.norm(x[:, 0]), Selection(*selection)


class PartBlock(ObservedBlock):
    """`Block` of which the class token and each head's part go on.

    x (B, N, C) and the layers before -> x (B, 1+H, C), the parts (B, H) int64, each head's score (B, H, N) fp32.
    """

    def forward(self, x: Tensor, earlier: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
        attended, layer = self.attn(self.norm1(x))
        x = self.add_branches(x, attended)
        score = psm.per_head([*earlier, layer])
        index = _best_patches(score)
        return gather_tokens(x, _with_class(index)), index, score


class PrunedPartAttention(Attention):
    """`Attention` that picks first, and then computes the class token and the parts only.

    x (B, N, C) and the layers before -> x (B, 1+H, C), the parts (B, H) int64, each head's score (B, H, N) fp32. Of its
    own map the score needs row 0.
    """

    def forward(self, x: Tensor, earlier: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project_qkv(x).unbind(2)
        score = psm.carry(_class_row(q.detach(), k.detach()), earlier)
        index = _best_patches(score)
        q = gather_tokens(q.flatten(2), _with_class(index)).unflatten(2, (self.num_heads, self.head_dim))
        return self.attend(q, k, v), index, score


class PrunedPartBlock(Block):
    """`PartBlock` that computes the class token and the parts only."""

    attention = PrunedPartAttention

    def forward(self, x: Tensor, earlier: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
        attended, index, score = self.attn(self.norm1(x), earlier)
        return self.add_branches(gather_tokens(x, _with_class(index)), attended), index, score


def _class_row(q: Tensor, k: Tensor) -> Tensor:
    """Row 0 of every head's map, (B, H, N) fp32. A product and a sum: autocast would round a matmul's logits."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (k * (q[:, :1].to(dtype) * q.shape[-1] ** -0.5)).sum(-1)  # (B, N, H)
    return logits.transpose(1, 2).softmax(-1).float()


def _best_patches(score: Tensor) -> Tensor:
    """The best patch of each head's score (B, H, N), the class token left out: (B, H)."""
    return pick(score.flatten(0, 1), 1, TransFG.first_candidate).view(score.shape[:2])


def _with_class(index: Tensor) -> Tensor:
    """The class token, then the parts: (B, 1+H)."""
    return F.pad(index, (1, 0))
