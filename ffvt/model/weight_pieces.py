"""Pieces of a source of weights, in our names, and what they tell of its size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ffvt.model.config import PRESETS, FFVTConfig

QKV = ("query", "key", "value")  # the order of their rows in ours
SIZES = ("patch_size", "embed_dim", "depth", "mlp_dim")


@dataclass(frozen=True)
class Piece:
    """One source tensor and where it goes: a parameter of ours, or some of its rows."""

    source: str
    target: str
    value: Tensor
    rows: slice | None = None

    @property
    def is_head(self) -> bool:
        return self.target.startswith("head.")

    @property
    def block(self) -> int | None:
        """The number of the source's block that it is part of."""
        found = re.match(r"blocks\.(\d+)\.", self.target)
        return int(found[1]) if found else None


def qkv_rows(part: str, config: FFVTConfig) -> slice:
    """The rows of our packed projection that query, key or value fills."""
    start = QKV.index(part) * config.embed_dim
    return slice(start, start + config.embed_dim)


def check_sizes(pieces: Iterable[Piece], config: FFVTConfig, fused: bool) -> None:
    """Compares a source, in our names, with a model's configuration.

    fused: whether the source has a fusion block.

    Raises:
        ValueError: the source has no class token, another size, or LayerScale where the model has none; the message
            names the preset that fits.
    """
    shapes = {piece.target: tuple(piece.value.shape) for piece in pieces}
    if {"pos_embed", "patch_embed.proj.weight"} <= shapes.keys() and "cls_token" not in shapes:
        raise ValueError("load_weights: source must have a class token, by which FFVT selects; got none")
    found = _sizes(shapes, {piece.block for piece in pieces} - {None}, fused, config)
    wrong = [name for name in SIZES if found.get(name, getattr(config, name)) != getattr(config, name)]
    if found.get("depth", 0) < config.depth and "depth" in wrong:  # part of a model: the rest stays as it is
        wrong.remove("depth")
    if wrong:
        given = ", ".join(f"{name}={getattr(config, name)}" for name in wrong)
        theirs = ", ".join(f"{name}={found[name]}" for name in wrong)
        raise ValueError(f"load_weights: the model must have the source's {theirs}; got {given}{_advice(found)}")
    if "blocks.0.ls1.gamma" in shapes and config.layer_scale is None:
        raise ValueError(
            "load_weights: layer_scale must be a number, as the source has LayerScale (blocks.0.ls1.gamma: the model "
            f"has no such parameter); got layer_scale=None{_advice(found)}"
        )


def _sizes(shapes: dict[str, tuple[int, ...]], blocks: set[int], fused: bool, config: FFVTConfig) -> dict[str, Any]:
    """The fields of `FFVTConfig` that can be seen in the shapes, as far as those are there."""
    found: dict[str, Any] = {}
    patch, hidden = shapes.get("patch_embed.proj.weight", ()), shapes.get("blocks.0.mlp.fc1.weight", ())
    if len(patch) == 4:
        found["embed_dim"] = patch[0]
        if config.backbone is None and patch[2] == patch[3]:
            found["patch_size"] = patch[2]
    if len(hidden) == 2:
        found["mlp_dim"] = hidden[0]
    if blocks:
        found["depth"] = max(blocks) + 1 + fused
    return found


def _advice(found: dict[str, Any]) -> str:
    """The preset that a source fits, in brackets."""
    fits = [
        name
        for name, preset in PRESETS.items()
        if set(SIZES) <= found.keys()
        and all(preset[size] == found[size] for size in SIZES)
        and "backbone" not in preset
    ]
    return f" ({fits[0]} fits the source)" if fits else ""
