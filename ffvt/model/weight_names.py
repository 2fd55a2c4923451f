"""Names of other layouts in ours: Google's .npz, the authors' state dicts (FFVT's, TransFG's), timm's and our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ffvt.errors import printable
from ffvt.model.config import FFVTConfig
from ffvt.model.weight_names_huggingface import from_hugging_face, is_hugging_face
from ffvt.model.weight_pieces import QKV, Piece, check_sizes, qkv_rows


@dataclass
class Translation:
    format: str
    pieces: list[Piece] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # source name -> why


def translate(entries: Mapping[str, Tensor], config: FFVTConfig, use_last: bool) -> Translation:
    """Pieces for a model of `config` from a flat mapping in any known layout.

    use_last: whether the source's last block and final norm fill ours.

    Raises:
        ValueError: no entry is recognised, the source is of another size, or an entry would change what the model
            computes and has no place in it.
    """
    name, layout = _recognise(entries)
    translation = Translation(name)
    found = []
    for key, value in entries.items():
        piece = layout(key, value, config)
        if piece is None:
            _refuse_if_needed(key)
            translation.ignored[key] = "not part of this model"
        else:
            found.append(piece)
    fused = any(key.startswith(_FUSION) for key in entries)
    check_sizes(found, config, fused)
    final = f"blocks.{config.depth - 1}" if config.kind == "vit" else "last_block"
    leaves_norm = config.kind == "ffvt"  # its authors leave it, TransFG's take it
    for piece in found:
        is_final = piece.block == config.depth - 1 or piece.target.startswith("last_block.")
        if is_final:
            rest = re.sub(r"^(blocks\.\d{1,4}|last_block)\.", "", piece.target)
            piece = replace(piece, target=f"{final}.{rest}")
        if fused and piece.source.startswith("transformer.encoder.encoder_norm."):
            translation.ignored[piece.source] = "the source has a final norm of its fusion"
        elif (is_final or (leaves_norm and piece.target.startswith("norm."))) and not (use_last or fused):
            translation.ignored[piece.source] = f"last_block='random' leaves {_LEFT[config.kind]}"
        else:
            translation.pieces.append(piece)
    return translation


def is_part_of_model(key: str, entries: Mapping[str, Tensor], config: FFVTConfig) -> bool:
    """Whether an entry of this name has a place in the model, in the layout of the other entries."""
    _, layout = _recognise({**entries, key: torch.empty(0)})
    return layout(key, torch.empty(1, 1, 1, 1), config) is not None


# Where the last block of a source begins that is no plain ViT: ours, the FFVT authors', TransFG's.
_FUSION = ("last_block.", "transformer.encoder.ff_", "transformer.encoder.part_")
_LEFT = {"ffvt": "the fusion block and the final norm", "transfg": "the part layer"}

# Parts of a source that change what its blocks see or compute, and what to say of those without a place in ours.
_NEEDED = {
    r"(blocks\.|transformer\.encoder\.layer\.|Transformer/encoderblock_)": "every part of the source's blocks",
    r"(\w+\.)?(encoder\.)?layers?\.\d+\.": "every part of the source's blocks",
    r"(\w+\.)*(reg_token$|register_tokens$)": "the source's register tokens",
    r"(\w+\.)*(dist_token|distillation_token)$": "the source's distillation token",
    r"(\w+\.)*(norm_pre|pre_layrnorm|pre_layernorm)\.": "the source's norm before the blocks (CLIP's)",
    r"(\w+\.)*relative_position_bias": "the source's relative positions",
}


def _refuse_if_needed(key: str) -> None:
    for pattern, part in _NEEDED.items():
        if re.match(pattern, key):
            raise ValueError(
                f"load_weights: {part} must have a place in the model; got {printable(repr(key))} "
                "(ffvt.add_feature_fusion, which takes the model itself, keeps all its parts)"
            )


def _recognise(entries: Mapping[str, Tensor]) -> tuple[str, Callable[[str, Tensor, FFVTConfig], Piece | None]]:
    keys = list(entries)
    if any(key.startswith(("Transformer/", "embedding/", "conv_root/", "head/")) or key == "cls" for key in keys):
        return "Google .npz", _from_google
    if any(key.startswith(("transformer.", "part_head.")) for key in keys):
        of_transfg = any(key.startswith(("transformer.encoder.part_", "part_head.")) for key in keys)
        return ("TransFG's state dict" if of_transfg else "authors' state dict"), _from_authors
    if any(_OURS.fullmatch(key) or key.startswith("blocks.") for key in keys):
        return ("ffvt" if any(key.startswith("last_block.") for key in keys) else "timm's names"), _from_timm
    if any(map(is_hugging_face, keys)):
        return "Hugging Face's names", from_hugging_face
    shown = printable(", ".join(map(repr, keys[:3]))) or "nothing"
    known = "Google's, the authors', timm's, Hugging Face's or ours"
    raise ValueError(f"load_weights: source must be {known}; got entries {shown}")


_OUR_BLOCK = r"(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma"
_OURS = re.compile(
    rf"cls_token|pos_embed|patch_embed\.(proj\.(weight|bias)|backbone\..+)|(norm|head)\.(weight|bias)"
    rf"|(blocks\.\d{{1,4}}|last_block)\.({_OUR_BLOCK})"
)


def _from_timm(key: str, value: Tensor, config: FFVTConfig) -> Piece | None:
    """timm's names are ours, but for the fusion block, which only our fused models have."""
    return Piece(key, key, value) if _OURS.fullmatch(key) else None


_AUTHORS_TOP = {
    "transformer.embeddings.position_embeddings": "pos_embed",
    "transformer.embeddings.cls_token": "cls_token",
    "transformer.embeddings.patch_embeddings.": "patch_embed.proj.",
    "transformer.encoder.encoder_norm.": "norm.",
    "transformer.encoder.ff_encoder_norm.": "norm.",
    "transformer.encoder.part_norm.": "norm.",
    "head.": "head.",
    "part_head.": "head.",
}
_AUTHORS_BLOCK = {
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "attn.out": "attn.proj",
}
_AUTHORS_RESNET = {
    r"root\.conv\.": "stem.conv.",
    r"root\.gn\.": "stem.norm.",
    r"\.downsample\.": ".downsample.conv.",
    r"\.gn_proj\.": ".downsample.norm.",
    r"\.gn(\d)\.": r".norm\1.",
}


def _from_authors(key: str, value: Tensor, config: FFVTConfig) -> Piece | None:
    for prefix, ours in _AUTHORS_TOP.items():
        if key.startswith(prefix):
            return Piece(key, ours + key.removeprefix(prefix), value)
    if "hybrid_model." in key:
        return Piece(key, "patch_embed.backbone." + _authors_resnet(key.partition("hybrid_model.")[2]), value)
    found = re.fullmatch(
        r"transformer\.encoder\.(?:layer\.(\d{1,4})|ff_last_layer|part_layer)\.(.+)\.(weight|bias)", key
    )
    if not found:
        return None
    number, part, kind = found.groups()
    block = "last_block" if number is None else f"blocks.{number}"
    if part.removeprefix("attn.") in QKV:
        return Piece(key, f"{block}.attn.qkv.{kind}", value, qkv_rows(part.removeprefix("attn."), config))
    return Piece(key, f"{block}.{_AUTHORS_BLOCK[part]}.{kind}", value) if part in _AUTHORS_BLOCK else None


def _authors_resnet(name: str) -> str:
    """The authors' ResNet names (blocks and units from 1) in timm's (stages and blocks from 0)."""
    name = re.sub(r"body\.block(\d+)\.unit(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}.", name)
    for theirs, ours in _AUTHORS_RESNET.items():
        name = re.sub(theirs, ours, name)
    return name


_GOOGLE_TOP = {
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
_GOOGLE_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_2": "norm2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
    "MultiHeadDotProductAttention_1/out": "attn.proj",
}
_GOOGLE_KIND = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_GOOGLE_RESNET_UNIT = {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}


def _from_google(key: str, value: Tensor, config: FFVTConfig) -> Piece | None:
    if key in _GOOGLE_TOP:
        if key.endswith("/kernel"):
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        return Piece(key, _GOOGLE_TOP[key], value)
    if resnet := re.fullmatch(r"(conv_root|gn_root|block\d+/unit\d+/\w+)/(kernel|scale|bias)", key):
        return _from_google_resnet(key, value, *resnet.groups())
    found = re.fullmatch(r"Transformer/encoderblock_(\d{1,4})/(.+)/(kernel|scale|bias)", key)
    if not found:
        return None
    number, part, kind = found[1], found[2], _GOOGLE_KIND[found[3]]
    heads = part.removeprefix("MultiHeadDotProductAttention_1/")
    if heads in QKV:  # kernel (C, H, D), bias (H, D)
        value = value.flatten(1).T if kind == "weight" else value.flatten()
        return Piece(key, f"blocks.{number}.attn.qkv.{kind}", value, qkv_rows(heads, config))
    if part not in _GOOGLE_BLOCK:
        return None
    if found[3] == "kernel":  # attention out (H, D, C), MLP (in, out)
        value = value.flatten(0, -2).T
    return Piece(key, f"blocks.{number}.{_GOOGLE_BLOCK[part]}.{kind}", value)


def _from_google_resnet(key: str, value: Tensor, part: str, kind: str) -> Piece:
    value = value.permute(3, 2, 0, 1) if kind == "kernel" else value.flatten()
    if part.endswith("_root"):
        name = "stem.conv" if part == "conv_root" else "stem.norm"
    else:
        block, unit, leaf = part.split("/")
        leaf = _GOOGLE_RESNET_UNIT.get(leaf) or re.sub(r"^gn", "norm", leaf)
        name = f"stages.{int(block.removeprefix('block')) - 1}.blocks.{int(unit.removeprefix('unit')) - 1}.{leaf}"
    return Piece(key, f"patch_embed.backbone.{name}.{_GOOGLE_KIND[kind]}", value)
