"""The parts of the model: patch embedding, attentions, MLP, blocks.

A `Class...` or `Pruned...` form computes only the rows that are read later. It has the parameters, under the names, and
up to rounding the numbers of the full form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffvt.criteria import Layer
from ffvt.errors import as_integer, require
from ffvt.kernels.backends import cpp_serves
from ffvt.kernels.ops import attention_stats, dropout, gather_tokens, maws_attention_qkvpacked, maws_select
from ffvt.model.config import FFVTConfig

LAYER_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Images (B, 3, S, S) -> patch tokens (B, N-1, C), row by row; optionally through a ResNet-50 first."""

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.backbone = _resnet50() if config.backbone else None
        channels, patch = (self.backbone.num_features, 1) if self.backbone else (3, config.patch_size)
        self.proj = nn.Conv2d(channels, config.embed_dim, kernel_size=patch, stride=config.patch_stride or patch)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            expected = f"(B, 3, {self.image_size}, {self.image_size})"
            raise ValueError(f"FFVT: images must be {expected}; got images.shape={tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"FFVT: images must be floating point, normalised; got images.dtype={images.dtype}")
        if self.backbone:
            images = self.backbone(images)
        return self.proj(images).flatten(2).transpose(1, 2)


def _resnet50() -> nn.Module:
    """The hybrid's stem: ResNet-50 v2 (BiT), stages 3-4-9, stride 16, without its head."""
    try:
        from timm.layers import StdConv2dSame
        from timm.models.resnetv2 import ResNetV2
    except ImportError as error:
        raise ImportError("r50_vit_b16 needs timm: pip install 'ffvt[timm]'") from error
    resnet = ResNetV2(
        layers=(3, 4, 9), num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=StdConv2dSame
    )
    for name, module in resnet.named_modules():
        if isinstance(module, nn.GroupNorm) and not name.endswith("downsample.norm"):
            module.eps = 1e-6  # as the authors; timm's 1e-5 is theirs in the shortcut only
    return resnet


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection: x (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        where = type(self).__name__
        dim, num_heads = as_integer(where, "dim", dim), as_integer(where, "num_heads", num_heads)
        require(num_heads >= 1, where, "num_heads", "at least 1", num_heads)
        require(dim >= 1 and dim % num_heads == 0, where, "dim", f"a multiple of num_heads={num_heads}", dim)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.project_qkv(x).unbind(2))

    def project_qkv(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 3, H, D), a view of the projection's output."""
        dim = self.num_heads * self.head_dim
        if x.ndim != 3 or x.shape[2] != dim:
            raise ValueError(f"{type(self).__name__}: x must be (B, N, {dim}); got x.shape={tuple(x.shape)}")
        return self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of some query rows q (B, M, H, D) over k, v (B, N, H, D), projected: (B, M, C)."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.merge_heads(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))

    def merge_heads(self, out: Tensor) -> Tensor:
        """(B, M, H, D) -> the output projection's (B, M, C)."""
        return self.proj(out.flatten(2))


class ClassAttention(Attention):
    """`Attention` that computes the class token's row only: x (B, N, C) -> (B, 1, C)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project_qkv(x).unbind(2)
        return self.attend(q[:, :1], k, v)


class MAWSAttention(Attention):
    """Multi-head self-attention that also picks the K tokens of largest mutual attention weight.

    `forward` returns the picks beside the tokens. In a block of your own:

        attended, index = self.attn(self.norm1(x))  # x (B, N, C), token 0 is the class token
        x = x + attended  # then the MLP, as in any block
        tokens = ffvt.gather_tokens(x, index)  # (B, K, C), the picked tokens

    Code that expects the tokens alone takes `self.attn(x)[0]`.

    Args:
        dim: C, width of the tokens.
        num_heads: H, attention heads.
        num_select: K, tokens to pick.
        qkv_bias: whether the packed projection has a bias.
        first_candidate: tokens [0, first_candidate) are never picked; 0 as the authors, 1 leaves out the class token.

    Raises:
        TypeError: dim, num_heads, num_select or first_candidate is no integer.
        ValueError: dim is no multiple of num_heads, or a count is out of range.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """

    def __init__(
        self, dim: int, num_heads: int, num_select: int, qkv_bias: bool = True, first_candidate: int = 0
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        where = type(self).__name__
        self.num_select = as_integer(where, "num_select", num_select)
        self.first_candidate = as_integer(where, "first_candidate", first_candidate)
        require(self.num_select >= 1, where, "num_select", "at least 1", num_select)
        require(self.first_candidate >= 0, where, "first_candidate", "at least 0", first_candidate)

    def forward(self, x: Tensor, need_score: bool = False) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Attends and selects.

        Args:
            x: tokens (B, N, C), token 0 being the class token.
            need_score: whether the score of every token is returned too.

        Returns:
            x: (B, N, C), the attended tokens. The only result that carries a gradient.
            index: (B, K) int64, the picks, best first.
            score: (B, N) fp32, with need_score only.

        Raises:
            ValueError: x is not (B, N, C), or has fewer than first_candidate + K tokens.
        """
        qkv = self.project_qkv(x)
        out, index, score = maws_attention_qkvpacked(qkv, self.num_select, first_candidate=self.first_candidate)
        x = self.merge_heads(out)
        return (x, index, score) if need_score else (x, index)


class PrunedMAWSAttention(MAWSAttention):
    """`MAWSAttention` that computes the class token and the picks only.

    x (B, N, C) -> x (B, 1+K, C), the rows of the input that these are (B, 1+K) int64, index (B, K) int64, score (B, N)
    fp32.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.project_qkv(x).unbind(2)
        index, score = maws_select(q, k, self.num_select, first_candidate=self.first_candidate)
        rows = F.pad(index, (1, 0))  # the class token, then the picks
        q = gather_tokens(q.flatten(2), rows).unflatten(2, (self.num_heads, self.head_dim))
        return self.attend(q, k, v), rows, index, score


class ObservedAttention(Attention):
    """`Attention` that leaves its statistics behind: x (B, N, C) -> x (B, N, C), a `Layer`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Layer]:
        q, k, v = self.project_qkv(x).unbind(2)
        out, stats = attention_stats(q, k, v)
        return self.merge_heads(out), Layer(q.detach(), k.detach(), v.detach(), stats)


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps no mask where the C++ kernels serve. Elsewhere PyTorch's own is faster."""

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.p > 0
        if drops and x.device.type == "cpu" and x.dtype != torch.float64 and cpp_serves():
            return dropout(x, self.p)
        return super().forward(x)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between, dropout after each."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)); (B, N, C) -> (B, N, C)."""

    attention: type[Attention] = Attention

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = self.make_attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, config.mlp_dim, config.dropout)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def make_attention(self, config: FFVTConfig) -> Attention:
        return self.attention(config.embed_dim, config.num_heads, config.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.add_branches(x, self.attn(self.norm1(x)))

    def add_branches(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual additions, for whichever rows are given: x and attended (B, M, C) -> (B, M, C)."""
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class ClassBlock(Block):
    """`Block` that computes the class token only: (B, N, C) -> (B, 1, C)."""

    attention = ClassAttention

    def forward(self, x: Tensor) -> Tensor:
        return self.add_branches(x[:, :1], self.attn(self.norm1(x)))


class ObservedBlock(Block):
    """`Block` that leaves its attention's statistics behind: (B, N, C) -> (B, N, C), a `Layer`."""

    attention = ObservedAttention

    def forward(self, x: Tensor) -> tuple[Tensor, Layer]:
        attended, layer = self.attn(self.norm1(x))
        return self.add_branches(x, attended), layer


class SelectingBlock(Block):
    """`Block` that picks K of its tokens.

    x (B, N, C) -> x (B, N, C), the picked tokens (B, K, C), their index (B, K) int64, the score (B, N) fp32 of all.
    """

    attention = MAWSAttention

    def make_attention(self, config: FFVTConfig) -> Attention:
        heads, bias = config.num_heads, config.qkv_bias
        return self.attention(config.embed_dim, heads, config.num_select, bias, config.first_candidate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attended, index, score = self.attn(self.norm1(x), need_score=True)
        x = self.add_branches(x, attended)
        return x, gather_tokens(x, index), index, score


class PrunedSelectingBlock(SelectingBlock):
    """`SelectingBlock` that computes the class token and the picks only: of x it returns the class token, (B, 1, C)."""

    attention = PrunedMAWSAttention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attended, rows, index, score = self.attn(self.norm1(x))
        x = self.add_branches(gather_tokens(x, rows), attended)  # (B, 1+K, C)
        return x[:, :1], x[:, 1:], index, score
