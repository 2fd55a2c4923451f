"""Small timm ViTs, one of each architecture: timm's own name with narrow sizes, and what FFVT makes of it."""

from __future__ import annotations

import pytest

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
from timm.layers import Attention, AttentionRope  # noqa: E402
from timm.models.eva import Eva, EvaAttention  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)

# What the tests take of timm comes through here, where its absence skips them.
__all__ = ["Attention", "ParallelScalingBlock", "ParallelThingsBlock", "VisionTransformer", "timm"]

NARROW = dict(embed_dim=48, depth=3, num_heads=3, num_classes=5)
SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=4, num_classes=7)
NAMED = {  # name: side of the image, four patches
    "vit_tiny_patch16_224": 64,
    "vit_small_patch32_224": 128,
    "vit_base_patch16_clip_224": 64,  # norm before the blocks
    "vit_base_patch32_clip_quickgelu_224": 128,
    "vit_base_patch14_reg1_tipsv2": 56,
    "vit_base_patch16_radio_v3": 64,
    "vit_intern300m_patch14_448": 56,
    "beit3_base_patch16_224": 64,  # norm behind the attention and inside the MLP
    "eva_large_patch14_196": 56,
    "flexivit_small": 64,
    "deit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,  # a second prefix token
    "deit3_small_patch16_224": 64,  # LayerScale, no position for the class token
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_giant_patch14_dinov2": 56,  # SwiGLU
    "vit_small_patch16_dinov3": 64,  # RoPE, registers, LayerScale
    "vit_small_plus_patch16_dinov3": 64,  # SwiGLU
    "vit_small_patch16_dinov3_qkvb": 64,
    "vit_small_patch16_lingbot": 64,
    "eva_giant_patch14_224": 56,
    "eva02_tiny_patch14_224": 56,
    "eva02_base_patch16_clip_224": 64,
    "vit_small_patch16_rope_224": 64,
    "vit_small_patch16_rope_ape_224": 64,
    "vit_small_patch16_rope_mixed_224": 64,  # a table per block
    "vit_small_patch16_rope_mixed_ape_224": 64,
    "vit_pe_core_tiny_patch16_384": 64,
    "vit_pe_spatial_tiny_patch16_512": 64,
    "vit_tiny_r_s16_p8_224": 64,  # convolutions before the patches
}
MADE = {  # by class: switches that no name above has
    "sapiens2": lambda: timm.create_model(  # grouped heads, q/k norm
        "vit_base_patch16_sapiens2", img_size=64, num_kv_heads=(1, 3, 1), **NARROW
    ),
    "q/k norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "gated, registers": lambda: gated(VisionTransformer(**SMALL, reg_tokens=2)),
    "average pooled": lambda: VisionTransformer(**SMALL, global_pool="avg"),
    "rope, gated": lambda: gated_rope(Eva(**SMALL, use_rot_pos_emb=True, num_reg_tokens=2, ref_feat_shape=(4, 4))),
}
BUILDS = {  # by class, one per part of the adapter
    "plain": lambda: VisionTransformer(**SMALL),
    "layer scale, registers": lambda: VisionTransformer(**SMALL, init_values=0.1, reg_tokens=3, no_embed_class=True),
    "q/k norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "average pooled": lambda: VisionTransformer(**SMALL, global_pool="avg"),
    "dynamic size": lambda: VisionTransformer(**SMALL, dynamic_img_size=True),
    "rope": lambda: Eva(**SMALL, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
    "rope, registers, swiglu": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, num_reg_tokens=2, swiglu_mlp=True, qkv_fused=False, use_abs_pos_emb=False
    ),
    "mixed rope, registers": lambda: Eva(
        **SMALL, rope_type="mixed", use_rot_pos_emb=True, num_reg_tokens=2, attn_type="rope", ref_feat_shape=(4, 4)
    ),
    "rope in halves, registers": lambda: Eva(
        **SMALL, rope_type="dinov3", use_rot_pos_emb=True, num_reg_tokens=2, attn_type="rope", rope_rotate_half=True
    ),
    "grouped heads": lambda: with_grouped_heads(Eva(**SMALL, use_rot_pos_emb=True, num_reg_tokens=2)),
}
NO_CLASS_TOKEN = "cls_token must be a class token; got cls_token=None"
NOT_ONE_ATTENTION = "every block must have one attention named attn; got a"
REFUSED = {  # name: the reason
    "vit_base_patch16_siglip_224": NO_CLASS_TOKEN,
    "vit_base_patch16_gap_224": NO_CLASS_TOKEN,
    "vit_wee_patch16_reg1_gap_256": NO_CLASS_TOKEN,
    "aimv2_large_patch14_224": NO_CLASS_TOKEN,
    "vit_medium_patch16_rope_reg1_gap_256": NO_CLASS_TOKEN,
    "vit_base_patch16_xp_224": f"{NOT_ONE_ATTENTION} ParallelScalingBlock",
    "vit_small_patch16_18x2_224": f"{NOT_ONE_ATTENTION} ParallelThingsBlock",
    "beit_base_patch16_224": "must be a timm VisionTransformer or Eva; got Beit",
    "vit_relpos_small_patch16_224": "must be a timm VisionTransformer or Eva; got VisionTransformerRelPos",
    "cait_xxs24_224": "must be a timm VisionTransformer or Eva; got Cait",
    "naflexvit_base_patch16_gap": "must be a timm VisionTransformer or Eva; got NaFlexVit",
    "xcit_nano_12_p16_224": "must be a timm VisionTransformer or Eva; got Xcit",
    "swin_tiny_patch4_window7_224": "must be a timm VisionTransformer or Eva; got SwinTransformer",
    "samvit_base_patch16": "must be a timm VisionTransformer or Eva; got VisionTransformerSAM",
}


def with_grouped_heads(vit):
    """Attentions with two keys and values for four queries, which timm repeats before the attention."""
    for block in vit.blocks:
        prefix = block.attn.num_prefix_tokens
        block.attn = AttentionRope(64, 4, num_kv_heads=2, qkv_fused=False, num_prefix_tokens=prefix)
    return vit


def gated(vit):
    """Attentions whose output passes a gate."""
    for block in vit.blocks:
        block.attn = Attention(64, 4, qkv_bias=True, gated=True)
    return vit


def gated_rope(vit):
    for block in vit.blocks:
        block.attn = EvaAttention(64, 4, num_prefix_tokens=3, scale_norm=False, gated=True)
    return vit


def build(name):
    """The small model of a name in NAMED or MADE."""
    if name in MADE:
        return MADE[name]()
    return timm.create_model(name, img_size=NAMED[name], **NARROW)


def image_size(vit):
    return vit.patch_embed.img_size[0]
