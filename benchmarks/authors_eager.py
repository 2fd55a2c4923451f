"""The form in which the authors' code computes an FFVT: a rival to measure against, and a second truth for the model.

What: the same function as `ffvt.FFVT` with the authors' state-dict names, in plain modules.
How: each block builds the N x N map twice, once softmaxed over the keys and once over the queries, and keeps both until
    the forward ends: the first because all maps are collected, the second because the column that is read is a view.
Memory: three maps (B, H, N, N) live while a block runs, two per block stay; autograd needs the first of them as well.
Limits: the authors' model only: feature fusion, no LayerScale, no backbone, every token selectable.
Source: FFVT (arXiv 2107.02341) and the behaviour of its published code; written from a description of it, not copied.

Under `torch.autocast` the modules stay as they are. On CUDA autocast computes softmax in fp32, so the maps there are as
large as in fp32; the authors' Apex O2 run kept them in fp16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffvt import FFVTConfig

LAYER_NORM_EPS = 1e-6


class AuthorsEagerFFVT(nn.Module):
    """Images (B, 3, S, S) -> logits (B, num_classes), the authors' way.

    Weights start at PyTorch's defaults, positions and class token at std 0.02: a head of zeros, as the authors start,
    would let every wrong model agree.

    Raises:
        ValueError: the configuration is outside the authors' model.
    """

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        extras = (not config.feature_fusion, config.layer_scale, config.backbone, config.first_candidate)
        if any(extras) or not config.qkv_bias:
            raise ValueError(f"AuthorsEagerFFVT: config must be the authors' fusion model; got {config}")
        self.config = config
        self.transformer = _Transformer(config)
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_index(images)[0]

    def forward_with_index(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the picks (B, L-1, K) int64, best first."""
        encoded, _maps, index = self.transformer(images)
        return self.head(encoded[:, 0]), torch.stack(index, dim=1)


class _Transformer(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return self.encoder(self.embeddings(images))


class Embeddings(nn.Module):
    """The class token and the patches, overlapping where the stride is below their side; TransFG's form shares it."""

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.position_embeddings = nn.Parameter(torch.randn(1, config.num_tokens, dim) * 0.02)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.patch_embeddings = nn.Conv2d(3, dim, kernel_size=patch, stride=config.patch_stride or patch)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embeddings(images).flatten(2).transpose(-1, -2)  # (B, N-1, C)
        class_token = self.cls_token.expand(images.shape[0], -1, -1)
        return self.dropout(torch.cat((class_token, patches), dim=1) + self.position_embeddings)


class _Encoder(nn.Module):
    """The first L-1 blocks, the gathering of their picks, and the last block over them."""

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.num_select = config.num_select
        self.layer = nn.ModuleList(_Block(config) for _ in range(config.depth - 1))
        self.ff_last_layer = _Block(config)
        self.ff_encoder_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(B, N, C) -> encoded (B, 1 + (L-1)K, C), the L full maps, L-1 picks (B, K)."""
        maps, columns, index = [], [], []
        tokens: list[list[Tensor]] = [[] for _ in range(hidden.shape[0])]
        for block in self.layer:
            hidden, column, probs = block(hidden)
            columns.append(column)  # a view: it keeps its whole map alive until this function returns
            maps.append(probs)
            index.append(mutual_attention_index(column, probs, self.num_select))
            for image, picked in enumerate(index[-1]):
                tokens[image].extend(hidden[image, picked])  # K tensors (C,)
        selected = torch.stack([torch.stack(of_image) for of_image in tokens])  # (B, (L-1)K, C)
        fused, _, probs = self.ff_last_layer(torch.cat((hidden[:, :1], selected), dim=1))
        maps.append(probs)
        return self.ff_encoder_norm(fused), maps, index


def mutual_attention_index(column: Tensor, probs: Tensor, num_select: int) -> Tensor:
    """column (B, H, N), probs (B, H, N, N) -> the K largest products of their head-means, (B, K) int64, best first."""
    contribution = column.mean(1)
    class_attention = probs[:, :, 0, :].mean(1)
    return torch.argsort(contribution * class_attention, dim=1, descending=True)[:, :num_select]


class _Block(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.ffn_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.ffn = MLP(config)
        self.attn = _Attention(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, column, probs = self.attn(self.attention_norm(x))
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), column, probs


class _Attention(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = dim // config.num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def heads_first(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D), a strided view."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> attended (B, N, C), column 0 of the query-wise softmax (B, H, N), the full map (B, H, N, N)."""
        query, key, value = (self.heads_first(linear(x)) for linear in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_dim)
        probs = F.softmax(scores, dim=-1)
        weights = F.softmax(scores, dim=-2)
        context = torch.matmul(probs, value).permute(0, 2, 1, 3).contiguous().view(x.shape)
        return self.out(context), weights[:, :, :, 0], probs


class MLP(nn.Module):
    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))
