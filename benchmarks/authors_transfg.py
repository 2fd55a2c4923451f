"""The form in which TransFG's code computes it: a rival to measure against, and a second truth for the model.

What: the same function as `ffvt.TransFG` with the authors' state-dict names, in plain modules.
How: every layer hands out its full map of attention; the maps are multiplied, head by head, from the first layer to the
    last, and the largest patch of row 0 names each head's part.
Memory: the maps (B, H, N, N) of the L-1 layers stay until the parts are chosen. As the chain of products stands in the
    forward, outside `torch.no_grad`, autograd keeps its L-2 products too while it lasts.
Limits: the authors' model only: no LayerScale, no backbone, biases everywhere.
Source: TransFG (arXiv 2103.07976), sections 3.2 and 3.3, and the behaviour of its published code; written from a
    description of it, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.authors_eager import LAYER_NORM_EPS, MLP, Embeddings
from ffvt import FFVTConfig


class AuthorsTransFG(nn.Module):
    """Images (B, 3, S, S) -> logits (B, num_classes), the authors' way.

    Weights start at PyTorch's defaults, positions and class token at std 0.02: a head of zeros, as the authors start,
    would let every wrong model agree.

    Raises:
        ValueError: the configuration is outside the authors' model.
    """

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        if config.kind != "transfg" or config.layer_scale or config.backbone or not config.qkv_bias:
            raise ValueError(f"AuthorsTransFG: config must be the authors' model; got {config}")
        self.config = config
        self.transformer = _Transformer(config)
        self.part_head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_parts(images)[0]

    def forward_with_parts(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits; the class token that they are of, (B, C); the parts (B, H), counted as tokens; row 0 of the product
        of each head's maps, (B, H, N)."""
        encoded, parts, row = self.transformer(images)
        return self.part_head(encoded[:, 0]), encoded[:, 0], parts, row


class _Transformer(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder(self.embeddings(images))


class _Encoder(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.depth - 1))
        self.part_layer = _Layer(config)
        self.part_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> encoded (B, 1 + H, C), the parts (B, H), row 0 of the product of the maps (B, H, N)."""
        maps = []
        for layer in self.layer:
            hidden, attention = layer(hidden)
            maps.append(attention)
        row = product_of_maps(maps)[:, :, 0]
        parts = row[:, :, 1:].argmax(2) + 1
        of_image = [hidden[image, parts[image]] for image in range(len(hidden))]  # (H, C) each
        encoded, _ = self.part_layer(torch.cat((hidden[:, :1], torch.stack(of_image)), dim=1))
        return self.part_norm(encoded), parts, row


def product_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, H, N, N), first layer first -> what the last layer's tokens took from the first's inputs."""
    product, *later = maps
    for attention in later:
        product = torch.matmul(attention, product)
    return product


class _Layer(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.ffn_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.attn = _Attention(config.embed_dim, config.num_heads)
        self.ffn = MLP(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, attention = self.attn(self.attention_norm(x))
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), attention


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> attended (B, N, C), the map (B, H, N, N)."""
        heads = (linear(x).unflatten(2, (self.num_heads, -1)) for linear in (self.query, self.key, self.value))
        query, key, value = (head.transpose(1, 2) for head in heads)  # (B, H, N, D)
        logits = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        attention = F.softmax(logits, dim=-1)
        mixed = torch.matmul(attention, value).transpose(1, 2).flatten(2)
        return self.out(mixed), attention
