"""`add_feature_fusion`: a timm ViT with a class token becomes an FFVT, all its parts kept.

How: each of the first L-1 blocks runs as timm wrote it, with an attention that selects, or that leaves behind what
another criterion or token reduction reads (`timm_attention.py`). So LayerScale, registers, q/k normalisation, gates and
rotary positions need no code here; only where tokens no longer stand in order, in the fusion block and behind a
reduction, the rotary table is gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffvt.criteria import Criterion, Layer, find
from ffvt.errors import as_integer, require
from ffvt.kernels.ops import gather_tokens
from ffvt.model.config import as_declared, check_locations, check_reduced_selection, patches_left
from ffvt.model.reduction import TokenReduction
from ffvt.model.selection import Picker, SelectingModel, Selection
from ffvt.model.timm_attention import NAME, Fusing, Observed, Selecting, SelectionRequest, check_attention, give_role
from ffvt.model.timm_base import OfTimm, check_is_vit


class FeatureFusion(SelectingModel, OfTimm):
    """A timm ViT turned into an FFVT by `add_feature_fusion`; its methods are those of `ffvt.FFVT`, and timm's hooks.

    The ViT is `vit`; its own methods (`vit.forward_features`, `vit.forward_intermediates`) keep working.
    """

    def __init__(
        self,
        vit: nn.Module,
        num_select: int,
        num_classes: int,
        first_candidate: int,
        criterion: Criterion,
        keep_rate: float,
        locations: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.vit = vit
        self.num_select = num_select
        self.first_candidate = first_candidate
        self.criterion = criterion
        self.keep_rate, self.locations = keep_rate, locations
        self.reset_classifier(num_classes)
        *blocks, last_block = vit.blocks
        for number, block in enumerate(blocks):
            block.attn.fused_attn = True  # the call of scaled_dot_product_attention
            give_role(block.attn, Observed if self.observes(number) else Selecting)
        last_block.attn.fused_attn = True
        give_role(last_block.attn, Fusing if getattr(last_block.attn, "num_prefix_tokens", 1) > 1 else None)

    def reduces(self, number: int) -> bool:
        """Whether tokens are dropped after block `number`, from 0."""
        return self.keep_rate < 1 and number in self.locations

    def observes(self, number: int) -> bool:
        """Whether block `number` leaves its attention's statistics behind; else its attention picks by itself."""
        return not self.criterion.is_fused or self.reduces(number)

    @property
    def num_selecting(self) -> int:
        return len(self.vit.blocks) - 1

    @property
    def num_prefix_tokens(self) -> int:
        return self.vit.num_prefix_tokens

    def get_classifier(self) -> nn.Module:
        """The head, on the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a zero-initialised one; with 0 classes, by none.

        Raises:
            ValueError: another pooling than "token", the class token's.
        """
        name = "reset_classifier"
        require(global_pool in (None, "token"), name, "global_pool", "'token', as the head sees it", global_pool)
        num_classes, like = as_integer(name, "num_classes", num_classes), self.vit.cls_token
        require(num_classes >= 0, name, "num_classes", "at least 0", num_classes)
        self.head, self.num_classes = nn.Identity(), num_classes
        if num_classes:
            self.head = nn.Linear(self.vit.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self._renew_config()

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives, (B, C) -> logits (B, num_classes); the features themselves with pre_logits."""
        return features if pre_logits else self.head(features)

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        *blocks, last_block = self.vit.blocks
        recomputes = self.vit.grad_checkpointing and torch.is_grad_enabled()
        run = functools.partial(checkpoint, use_reentrant=False) if recomputes else _call
        x, ropes = self._embed(images)  # (B, N, C)
        reduction = TokenReduction(self.keep_rate, x.shape[1])
        picker = Picker(self.criterion, self.num_select, self.first_candidate, reduction, recomputes)
        grid = tuple(self.vit.patch_embed.dynamic_feat_size(images.shape[-2:]))
        for number, block in enumerate(blocks):
            rope = self._rope_of_left(ropes[number], reduction)
            if self.observes(number):
                x, layer = run(self._observe, block, x, rope)
                picker.judge(x, layer._replace(number=number, grid=grid))
                if self.reduces(number):
                    x = reduction.reduce(x, layer)
            else:
                x, *picks = run(self._select, block, x, rope)
                picker.take(*picks)
        selection = picker.selection()
        rope = self._rope_of_picks(ropes[-1], selection.index.flatten(1))
        x = run(_run_block, last_block, picker.fused(x), rope)
        return self._features(x[:, 0]), selection

    def _select(self, block: nn.Module, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One block as timm wrote it: x (B, N, C), the picked tokens (B, K, C), index (B, K), score (B, N)."""
        with SelectionRequest(self.num_select, self.first_candidate) as request:
            x = _run_block(block, x, rope)
        index, score = request.answer()
        return x, gather_tokens(x, index), index, score

    def _observe(self, block: nn.Module, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Layer]:
        """One block as timm wrote it, x (B, N, C), and what its attention left behind."""
        with SelectionRequest() as request:
            x = _run_block(block, x, rope)
        return x, request.answer()._replace(num_prefix_tokens=self.num_prefix_tokens)

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens (B, N, C) and the rotary table of every block, ([H,] N-P, E) or None."""
        vit = self.vit
        x, rope = vit._pos_embed(vit.patch_embed(images)), None
        if isinstance(x, tuple):  # timm's RoPE models
            x, rope = x
        mixed = rope is not None and getattr(vit, "rope_mixed", False)  # a table per block
        depth = len(vit.blocks)
        return vit.norm_pre(x), list(rope[:depth]) if mixed else [rope] * depth

    def _rope_of_left(self, rope: Tensor | None, reduction: TokenReduction) -> Tensor | None:
        """The rotary table of the tokens left; the token of those dropped stands nowhere, and is not rotated."""
        if rope is None or reduction.positions is None:
            return rope
        return self._rope_of_picks(rope, F.pad(reduction.positions[:, self.num_prefix_tokens :], (0, 1)))

    def _rope_of_picks(self, rope: Tensor | None, index: Tensor) -> Tensor | None:
        """The rotary table of picked tokens: rope ([H,] N-P, E), index (B, M) -> (B, H or 1, M, E).

        Prefix tokens (class token, registers) and the token of those dropped, N, are not rotated: sine 0, cosine 1.
        """
        if rope is None:
            return None
        rope = rope.expand(1, *([1] * (3 - rope.ndim)), *rope.shape)  # (1, H or 1, N-P, E)
        sine, cosine = rope.chunk(2, dim=-1)
        prefix = self.vit.num_prefix_tokens
        sine, cosine = F.pad(sine, (0, 0, prefix, 1)), F.pad(cosine, (0, 0, prefix, 1), value=1.0)
        table = torch.cat([sine, cosine], dim=-1).expand(index.shape[0], -1, -1, -1)  # (B, H or 1, N, E)
        return table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))

    def _features(self, class_token: Tensor) -> Tensor:
        """What the head sees; timm keeps the final norm before the pooling or after it, depending on the pooling."""
        vit = self.vit
        return vit.head_drop(getattr(vit, "fc_norm", nn.Identity())(vit.norm(class_token)))


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _run_block(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    return block(x) if rope is None else block(x, rope=rope)


def add_feature_fusion(
    timm_vit: nn.Module,
    num_select: int = 12,
    num_classes: int = 200,
    first_candidate: int = 0,
    criterion: str | Criterion = "maws",
    keep_rate: float = 1.0,
    locations: tuple[int, ...] = (3, 6, 9),
) -> FeatureFusion:
    """Turns a timm ViT into an FFVT with the same weights; its last block becomes the fusion block.

    Taken: timm's VisionTransformer and Eva classes, as built for ViT, DeiT, CLIP, DINOv2, DINOv3, EVA, Perception
    Encoder and others, with a class token and blocks of one attention each. LayerScale, registers, a distillation
    token, q/k norm, gates, grouped heads, pre- and post-norm, stochastic depth, dynamic image sizes, every pooling and
    rotary positions are kept. `timm_vit.set_grad_checkpointing()`, before or after, recomputes each block in the
    backward.

    Refused: models without a class token (SigLIP and others with global pooling only); attention or patch dropout;
    parallel blocks (`*_xp_*`, `*_18x2_*`); an attention that does not make exactly one call of
    scaled_dot_product_attention on q, k, v of one shape, without a mask (differential attention); and timm's other
    classes (BEiT, ViTs with relative positions, CaiT, NaFlexVit, SAM, Swin, Hiera and so on).

    Args:
        timm_vit: the ViT. It is used, not copied: it loses its head, its attentions change class, and its own
            `forward_features` keeps working.
        num_select: K, tokens picked by each block but the last.
        num_classes: classes of the new, zero-initialised head.
        first_candidate: tokens [0, first_candidate) are never picked. 0 is the authors' choice (class token and
            registers can be picked); `timm_vit.num_prefix_tokens` leaves them out.
        criterion: what picks the tokens, a name or an object of `ffvt.criteria`.
        keep_rate: fraction of the patches that stay after each block of `locations`; the others become one token,
            which rotary positions do not rotate. 1 keeps all.
        locations: numbers of these blocks, from 0, in order; not read with keep_rate=1.

    Returns:
        A module: images (B, 3, S, S) -> logits (B, num_classes), with `forward_with_selection` and `forward_features`.

    Raises:
        TypeError: not a timm VisionTransformer or Eva, a count that is no integer, or a criterion that is none.
        ValueError: a model of the refused kinds, fewer than two blocks, or a value that does not hold; with keep_rate
            below 1, the criteria vote, rollout and psm. The ViT is unchanged.
        ImportError: timm is missing.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    check_is_vit(NAME, "timm_vit", timm_vit)
    num_select = as_integer(NAME, "num_select", num_select)
    num_classes = as_integer(NAME, "num_classes", num_classes)
    first_candidate = as_integer(NAME, "first_candidate", first_candidate)
    criterion = find(criterion)
    keep_rate = as_declared(NAME, "keep_rate", keep_rate)
    locations = as_declared(NAME, "locations", locations)
    _check_vit(timm_vit)
    _check_selection(timm_vit, num_select, first_candidate)
    require(num_classes >= 1, NAME, "num_classes", "at least 1", num_classes)
    if keep_rate < 1:
        check_locations(NAME, locations, len(timm_vit.blocks) - 2)
        patches = patches_left(timm_vit.patch_embed.num_patches, keep_rate, len(locations))
        left = timm_vit.num_prefix_tokens + patches - first_candidate
        check_reduced_selection(NAME, keep_rate, criterion.name, num_select, left)
    timm_vit.reset_classifier(0)  # our head takes its place, on the class token: no parameter without a gradient stays
    timm_vit.attn_pool = None
    return FeatureFusion(timm_vit, num_select, num_classes, first_candidate, criterion, keep_rate, locations)


def _check_selection(vit: nn.Module, num_select: int, first_candidate: int) -> None:
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    require(0 <= first_candidate < tokens, NAME, "first_candidate", f"in [0, N={tokens})", first_candidate)
    limit = tokens - first_candidate
    require(1 <= num_select <= limit, NAME, "num_select", f"in [1, N - first_candidate = {limit}]", num_select)


def _check_vit(vit: nn.Module) -> None:
    require(getattr(vit, "cls_token", None) is not None, NAME, "cls_token", "a class token", None)
    require(len(vit.blocks) >= 2, NAME, "depth", "at least 2 blocks", len(vit.blocks))
    for block in vit.blocks:
        rate = getattr(getattr(getattr(block, "attn", None), "attn_drop", None), "p", None)
        if rate is None:
            raise ValueError(f"{NAME}: every block must have one attention named attn; got a {type(block).__name__}")
        require(rate == 0, NAME, "attn_drop", "0, attention dropout is not supported", rate)
    patch_drop = getattr(vit, "patch_drop", None)
    none = patch_drop is None or isinstance(patch_drop, nn.Identity)
    require(none, NAME, "patch_drop", "none, patch dropout is not supported", patch_drop)
    for block in vit.blocks:
        check_attention(block.attn, vit.cls_token)
