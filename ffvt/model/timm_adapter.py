"""`add_feature_fusion`: any timm ViT with a class token becomes an FFVT, all its parts kept.

How: each of the first L-1 blocks runs as timm wrote it, except that its one call of scaled_dot_product_attention is
served by `maws_attention`. So LayerScale, registers, q/k normalisation, gates and rotary positions need no code here;
only the fusion block, whose tokens come from many places, needs its rotary table gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffvt.kernels.ops import gather_tokens, maws_attention
from ffvt.model.selection import Selection


class _SelectingSDPA(TorchFunctionMode):
    """Within the block, scaled_dot_product_attention also selects; (index, score) is appended to `picks`."""

    def __init__(self, num_select: int, first_candidate: int, picks: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.num_select, self.first_candidate, self.picks = num_select, first_candidate, picks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (t.transpose(1, 2) for t in args)  # timm: (B, H, N, D)
        scale = (kwargs or {}).get("scale")
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out, index, score = maws_attention(q, k, v, self.num_select, scale, self.first_candidate)
        self.picks.append((index, score))
        return out.transpose(1, 2)


class FeatureFusion(nn.Module):
    """A timm ViT turned into an FFVT by `add_feature_fusion`; forward and forward_with_selection as `ffvt.FFVT`."""

    def __init__(self, vit: nn.Module, num_select: int, num_classes: int, first_candidate: int) -> None:
        super().__init__()
        self.vit = vit
        self.num_select = num_select
        self.first_candidate = first_candidate
        like = vit.cls_token
        self.head = nn.Linear(vit.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self._classify(images)[0]

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """Logits (B, num_classes) and what every block picked, (B, L-1, K) and (B, L-1, N)."""
        logits, picks = self._classify(images)
        index, score = zip(*picks)
        return logits, Selection(torch.stack(index, 1), torch.stack(score, 1))

    def _classify(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        vit = self.vit
        x, rope = vit._pos_embed(vit.patch_embed(images)), None
        if isinstance(x, tuple):  # timm's RoPE models
            x, rope = x
        x = vit.norm_pre(x)
        picked, picks = [], []
        for number, block in enumerate(vit.blocks[:-1]):
            with _SelectingSDPA(self.num_select, self.first_candidate, picks):
                x = self._run(block, x, self._rope_of(rope, number))
            picked.append(gather_tokens(x, picks[-1][0]))
        rows = F.pad(torch.cat([index for index, _ in picks], dim=1), (1, 0))
        last_rope = self._rope_of(rope, len(vit.blocks) - 1)
        fused = torch.cat([x[:, :1], *picked], dim=1)
        fused = self._run(vit.blocks[-1], fused, None if last_rope is None else self._rope_rows(last_rope, rows))
        return self.head(vit.head_drop(self._final_norm(fused[:, 0]))), picks

    def _run(self, block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        return block(x) if rope is None else block(x, rope=rope)

    def _rope_of(self, rope: Tensor | None, block: int) -> Tensor | None:
        return rope[block] if rope is not None and getattr(self.vit, "rope_mixed", False) else rope

    def _rope_rows(self, rope: Tensor, rows: Tensor) -> Tensor:
        """The rotary entries of the fused tokens but the first: rope ([H,] N-P, E), rows (B, M) -> (B, H or 1, M-1, E).

        Prefix tokens (class token, registers) are not rotated: sine 0, cosine 1.
        """
        rope = rope.expand(1, *([1] * (3 - rope.ndim)), *rope.shape)  # (1, H or 1, N-P, E)
        sine, cosine = rope.chunk(2, dim=-1)
        prefix = self.vit.num_prefix_tokens
        sine, cosine = F.pad(sine, (0, 0, prefix, 0)), F.pad(cosine, (0, 0, prefix, 0), value=1.0)
        table = torch.cat([sine, cosine], dim=-1).expand(rows.shape[0], -1, -1, -1)  # (B, H or 1, N, E)
        return table.gather(2, rows[:, None, 1:, None].expand(-1, table.shape[1], -1, table.shape[3]))

    def _final_norm(self, class_token: Tensor) -> Tensor:
        """timm keeps the final norm before the pooling or after it, depending on the pooling."""
        vit = self.vit
        return getattr(vit, "fc_norm", nn.Identity())(vit.norm(class_token))


def add_feature_fusion(
    timm_vit: nn.Module, num_select: int = 12, num_classes: int = 200, first_candidate: int = 0
) -> FeatureFusion:
    """Turns a timm ViT into an FFVT with the same weights; its last block becomes the fusion block.

    Args:
        timm_vit: a timm VisionTransformer or Eva (LayerScale, registers, q/k norm, RoPE and so on), with a class token.
            It is used, not copied.
        num_select: K, tokens picked by each block but the last.
        num_classes: classes of the new, zero-initialised head.
        first_candidate: tokens [0, first_candidate) are never picked. 0 is the authors' choice (class token and
            registers can be picked); `timm_vit.num_prefix_tokens` leaves them out.

    Returns:
        A module: images (B, 3, S, S) -> logits (B, num_classes), and `forward_with_selection`.

    Raises:
        TypeError: not a timm VisionTransformer or Eva. ValueError: no class token, attention or patch dropout, fewer
            than two blocks, or a value that does not hold. ImportError: timm is missing.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    name = "add_feature_fusion"
    try:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install 'ffvt[timm]'") from error
    if not isinstance(timm_vit, (VisionTransformer, Eva)):
        raise TypeError(f"{name}: timm_vit must be a timm VisionTransformer or Eva; got {type(timm_vit).__name__}")
    _check_vit(name, timm_vit)
    tokens = timm_vit.num_prefix_tokens + timm_vit.patch_embed.num_patches
    if not 0 <= first_candidate < tokens:
        raise ValueError(f"{name}: first_candidate must be in [0, N={tokens}); got first_candidate={first_candidate}")
    if not 1 <= num_select <= tokens - first_candidate:
        limit = tokens - first_candidate
        raise ValueError(
            f"{name}: num_select must be in [1, N - first_candidate = {limit}]; got num_select={num_select}"
        )
    if num_classes < 1:
        raise ValueError(f"{name}: num_classes must be at least 1; got num_classes={num_classes}")
    timm_vit.reset_classifier(0)  # our head takes its place, on the class token: no parameter without a gradient stays
    timm_vit.attn_pool = None
    for block in timm_vit.blocks:
        block.attn.fused_attn = True  # the one call that is served by maws_attention
    if hasattr(timm_vit.blocks[-1].attn, "num_prefix_tokens"):
        timm_vit.blocks[-1].attn.num_prefix_tokens = 1  # of the fused tokens only the first is taken as unrotated
    return FeatureFusion(timm_vit, num_select, num_classes, first_candidate)


def _check_vit(name: str, vit: nn.Module) -> None:
    if getattr(vit, "cls_token", None) is None:
        raise ValueError(f"{name}: timm_vit must have a class token; got cls_token=None")
    if len(vit.blocks) < 2:
        raise ValueError(f"{name}: timm_vit must have at least 2 blocks; got {len(vit.blocks)}")
    for block in vit.blocks:
        rate = getattr(getattr(getattr(block, "attn", None), "attn_drop", None), "p", None)
        if rate is None:
            raise ValueError(f"{name}: every block must have one attention named attn; got a {type(block).__name__}")
        if rate:
            raise ValueError(f"{name}: attention dropout is not supported; got attn_drop={rate}")
    patch_drop = getattr(vit, "patch_drop", None)
    if patch_drop is not None and not isinstance(patch_drop, nn.Identity):
        raise ValueError(f"{name}: patch dropout is not supported; got patch_drop={patch_drop}")
