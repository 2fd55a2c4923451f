"""Hugging Face's names in ours: ViT, DeiT, DINOv2, MSN and the encoder of MAE.

Two spellings are in use: that of the published files, which transformers still writes, and that of the modules of
transformers 5.
"""

from __future__ import annotations

import re

from torch import Tensor

from ffvt.model.config import FFVTConfig
from ffvt.model.weight_pieces import Piece, qkv_rows

_TOP = {  # behind the prefix of a model with a head, such as "vit."
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
    "classifier.": "head.",
}
_BLOCK = re.compile(r"(?:\w+\.)?(?:encoder\.)?layers?\.(\d{1,4})\.(.+)\.(weight|bias|lambda1)")
_PARTS = {
    "layernorm_before": "norm1",
    "norm1": "norm1",
    "layernorm_after": "norm2",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_HEADS = {
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
}


def is_hugging_face(key: str) -> bool:
    return _top(key) is not None or _BLOCK.fullmatch(key) is not None


def from_hugging_face(key: str, value: Tensor, config: FFVTConfig) -> Piece | None:
    """The piece that an entry is; None where a model of ours has no such part."""
    if top := _top(key):
        return Piece(key, top, value)
    found = _BLOCK.fullmatch(key)
    if not found:
        return None
    number, part, kind = found.groups()
    if part in _HEADS:
        return Piece(key, f"blocks.{number}.attn.qkv.{kind}", value, qkv_rows(_HEADS[part], config))
    kind = "gamma" if kind == "lambda1" else kind
    return Piece(key, f"blocks.{number}.{_PARTS[part]}.{kind}", value) if part in _PARTS else None


def _top(key: str) -> str | None:
    for name in (key, key.partition(".")[2]):
        for theirs, ours in _TOP.items():
            if name == theirs or (theirs.endswith(".") and name in (f"{theirs}weight", f"{theirs}bias")):
                return ours + name.removeprefix(theirs)
    return None
