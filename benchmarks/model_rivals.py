"""The rivals of the whole model: fusion models of one set of weights, and plain ViTs of another."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import nn

import ffvt
from benchmarks.attention_rivals import COMPOSITION, EAGER, OURS
from benchmarks.authors_eager import AuthorsEagerFFVT

TIMM, OURS_PLAIN = "timm plain ViT", "ours, plain ViT"
FUSION, PLAIN = (EAGER, COMPOSITION, OURS), (TIMM, OURS_PLAIN)
OURS_COMPILED = "ours, compiled"  # ours, by torch.compile; only where it is asked for, as it takes a minute to compile


def build_rival(name: str, config: ffvt.FFVTConfig) -> nn.Module:
    """A rival on the CPU; all fusion rivals with the same weights, all plain ones with the same."""
    torch.manual_seed(0)
    if name == OURS_PLAIN and find_spec("timm") is None:  # its speed does not depend on whose weights it has
        return ffvt.ViT(dataclasses.replace(config, feature_fusion=False))
    if name in PLAIN:
        timm_vit = build_timm_vit(config)
        if name == TIMM:
            return timm_vit
        return _loaded(ffvt.ViT(dataclasses.replace(config, feature_fusion=False)), timm_vit)
    eager = AuthorsEagerFFVT(config)
    if name == EAGER:
        return eager
    model = _loaded(ffvt.FFVT(dataclasses.replace(config, prune_dead_rows=name != COMPOSITION)), eager)
    if name == OURS_COMPILED:
        model.compile()
    return model


def _loaded(model: ffvt.ViT, source: nn.Module) -> ffvt.ViT:
    report = ffvt.load_weights(model, source.state_dict())
    if report.left or report.ignored:
        raise AssertionError(f"model_rivals: every weight must have a place; got {report}")
    return model


def build_timm_vit(config: ffvt.FFVTConfig) -> nn.Module:
    """timm's plain ViT of the same size, with SDPA, and with dropout and overlapping patches where ours has them."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.grid_size * config.patch_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        global_pool="token",
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.embed_dim,
        qkv_bias=config.qkv_bias,
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
    )
    for block in model.blocks:
        if not block.attn.fused_attn:
            raise AssertionError("model_rivals: timm's ViT must use SDPA; it is switched off (TIMM_FUSED_ATTN)")
        block.attn.proj_drop = nn.Identity()  # ours has none after the attention
    if config.patch_stride:
        model.patch_embed.proj.stride = (config.patch_stride, config.patch_stride)
        model.patch_embed.strict_img_size = False
    return model


def backend_of(name: str) -> AbstractContextManager:
    """What is forced around every call of a rival: plain PyTorch for the composition, nothing for the others."""
    return ffvt.use_backend("torch") if name == COMPOSITION else nullcontext()
