"""What an FFVT is made of: the configuration, its presets, and the authors' names for them."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ffvt.errors import printable, require

HEADS = ("ffvt", "transfg")
LAST_BLOCKS = ("random", "pretrained")  # how `load_weights` starts the fusion block
LARGEST = 1 << 20  # of any size; larger ones come from a damaged file, and would take all memory


def setting(default: Any, holds: Callable[[Any], bool], must: str) -> Any:
    """Declares a field of `FFVTConfig`: its default, what its values must be by themselves, and how to say so."""
    return field(default=default, metadata={"holds": holds, "must": must})


def size(default: int, largest: int = LARGEST) -> Any:
    """A field that counts something there is at least one of."""
    must = f"a positive integer, at most {largest}"
    return setting(default, lambda value: _is_integer(value) and 1 <= value <= largest, must)


def count(default: int) -> Any:
    """A field whose limits depend on other fields."""
    return setting(default, _is_integer, "an integer")


def switch(default: bool) -> Any:
    return setting(default, lambda value: isinstance(value, bool), "True or False")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class FFVTConfig:
    """The shape and the switches of a Feature Fusion Vision Transformer.

    Attributes:
        image_size: side of the square input image, pixels; a multiple of the patch's side.
        patch_size: side of one patch, pixels.
        patch_stride: pixels from one patch to the next, at most patch_size; None for patch_size: no overlap.
        num_classes: classes of the head.
        embed_dim: C, width of the tokens; a multiple of num_heads.
        depth: L, blocks, the fusion block included.
        num_heads: H, attention heads of a block.
        mlp_dim: hidden units of a block's MLP.
        num_select: K, tokens picked by each of the first L-1 blocks.
        feature_fusion: False gives the plain ViT of the same size.
        criterion: what picks the tokens, a name of `ffvt.criteria`: "maws", "vote:12", "random:7".
        head: "ffvt", or "transfg" for a TransFG, whatever feature_fusion says: one patch per head, by "psm".
        first_candidate: tokens [0, first_candidate) are never picked; 0 as the authors, 1 leaves out the class token.
        dropout: rate after the embeddings and inside the MLP, as the authors place it.
        qkv_bias: whether the query, key and value projections have a bias.
        layer_scale: initial value of LayerScale's per-channel factors; None for none.
        prune_dead_rows: compute only the rows that are read in the last two blocks: exact, and faster.
        gradient_checkpointing: recompute each block in the backward instead of keeping its activations.
        keep_rate: fraction of the patches that stay after each block of `locations`; the others become one token.
        locations: numbers of these blocks, from 0, in order; not read with keep_rate=1.
        backbone: "r50" puts a ResNet-50 before the patches (the hybrid; needs timm); None for none.
    """

    image_size: int = size(448)
    patch_size: int = size(16)
    num_classes: int = size(200, 1 << 24)
    embed_dim: int = size(768)
    depth: int = size(12, 256)
    num_heads: int = size(12)
    mlp_dim: int = size(3072)
    num_select: int = count(12)
    feature_fusion: bool = switch(True)
    first_candidate: int = count(0)
    criterion: str = setting("maws", lambda value: isinstance(value, str), "a name of ffvt.criteria")
    head: str = setting("ffvt", lambda value: value in HEADS, f"one of {', '.join(HEADS)}")
    dropout: float = setting(0.1, lambda value: _is_number(value) and 0 <= value < 1, "in [0, 1)")
    qkv_bias: bool = switch(True)
    layer_scale: float | None = setting(
        None, lambda value: value is None or _is_number(value), "a finite number or None"
    )
    prune_dead_rows: bool = switch(True)
    gradient_checkpointing: bool = switch(False)
    patch_stride: int | None = setting(
        None, lambda value: value is None or (_is_integer(value) and value >= 1), "a positive integer or None"
    )
    keep_rate: float = setting(1.0, lambda value: _is_number(value) and 0 < value <= 1, "in (0, 1]")
    locations: tuple[int, ...] = setting(
        (3, 6, 9),
        lambda value: isinstance(value, tuple) and all(map(_is_integer, value)),
        "integers",
    )
    backbone: str | None = setting(None, lambda value: value is None or value == "r50", "None or 'r50'")

    def __post_init__(self) -> None:
        for declared in fields(self):
            value = as_declared("FFVTConfig", declared.name, getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)
        if self.patch_stride is None:
            whole = self.image_size % self.patch_size == 0
            self._check("image_size", whole, f"a multiple of patch_size={self.patch_size}")
        else:
            self._check("patch_stride", self.patch_stride <= self.patch_size, f"at most patch_size={self.patch_size}")
            self._check("image_size", self.image_size >= self.patch_size, f"at least patch_size={self.patch_size}")
        self._check("embed_dim", self.embed_dim % self.num_heads == 0, f"a multiple of num_heads={self.num_heads}")
        self._check("patch_size", self.backbone is None or self.patch_size == 16, "16 behind the backbone")
        self._check("patch_stride", self.backbone is None or self.patch_stride is None, "None behind the backbone")
        if self.kind != "vit":
            self._check("depth", self.depth >= 2, f"at least 2 with {self.kind}")
        if self.kind == "ffvt":
            self._check_selection()
        if self.criterion != "maws":
            self._check_criterion()
        if self.keep_rate < 1:
            self._check_reduction()

    def _check_selection(self) -> None:
        tokens, first = self.num_tokens, self.first_candidate
        self._check("first_candidate", 0 <= first < tokens, f"in [0, N={tokens})")
        limit = f"in [1, N - first_candidate = {tokens - first}]"
        self._check("num_select", 1 <= self.num_select <= tokens - first, limit)

    def _check_criterion(self) -> None:
        from ffvt.criteria import find  # which needs torch

        name = find(self.criterion).name
        self._check("criterion", self.kind != "transfg" or name == "psm", "left out or 'psm' with transfg")

    def _check_reduction(self) -> None:
        self._check("keep_rate", self.kind != "transfg", "1 with transfg, whose part selection needs every token")
        selects = self.kind == "ffvt"
        check_locations("FFVTConfig", self.locations, self.depth - (2 if selects else 1))
        if selects:
            left = self.tokens_after(self.depth) - self.first_candidate
            check_reduced_selection("FFVTConfig", self.keep_rate, self.criterion, self.num_select, left)

    def _check(self, name: str, holds: bool, must: str) -> None:
        require(holds, "FFVTConfig", name, must, getattr(self, name))

    @property
    def kind(self) -> str:
        """ "vit", "ffvt" or "transfg"."""
        if self.head == "transfg":
            return "transfg"
        return "ffvt" if self.feature_fusion else "vit"

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return (self.image_size - self.patch_size) // (self.patch_stride or self.patch_size) + 1

    def reduces(self, number: int) -> bool:
        """Whether tokens are dropped after block `number`, from 0."""
        return self.keep_rate < 1 and number in self.locations

    def tokens_after(self, blocks: int) -> int:
        """Tokens that stand after the first `blocks` blocks."""
        reductions = sum(self.reduces(number) for number in range(blocks))
        return self.num_prefix_tokens + patches_left(self.grid_size**2, self.keep_rate, reductions)

    @property
    def num_tokens(self) -> int:
        """N: the class token and the patches."""
        return self.num_prefix_tokens + self.grid_size**2

    @property
    def num_prefix_tokens(self) -> int:
        """P, tokens before the patches: the class token."""
        return 1


def as_declared(where: str, name: str, value: Any) -> Any:
    """A value of the field `name` as `FFVTConfig` declares it; of a list, as JSON has it, the tuple.

    Raises:
        ValueError: the value does not hold by itself.
    """
    declared = FFVTConfig.__dataclass_fields__[name]
    value = tuple(value) if isinstance(declared.default, tuple) and isinstance(value, list) else value
    require(declared.metadata["holds"](value), where, name, declared.metadata["must"], value)
    return value


def check_locations(where: str, locations: tuple[int, ...], last: int) -> None:
    """Refuses blocks for token reduction that are out of order, or not before block `last`, which saves nothing.

    Raises:
        ValueError: they are.
    """
    rising = all(low < high for low, high in zip((-1, *locations), (*locations, last)))
    require(rising, where, "locations", f"in rising order, in [0, {last})", locations)


def check_reduced_selection(where: str, keep_rate: float, criterion: str, num_select: int, left: int) -> None:
    """Refuses a selection that token reduction makes impossible.

    Args:
        where: who checks.
        keep_rate: fraction of the patches that stay.
        criterion: name of the criterion.
        num_select: K.
        left: tokens that can still be picked where the fewest stand.

    Raises:
        ValueError: the criterion reads the square of the patches, or earlier layers; or K is too large.
    """
    from ffvt.criteria import find  # which needs torch

    must = f"one that does without the tokens dropped with keep_rate={keep_rate} (maws, class_row, ...)"
    require(not find(criterion).needs_every_token, where, "criterion", must, criterion)
    limit = f"at most the {left} tokens left with keep_rate={keep_rate}"
    require(num_select <= left, where, "num_select", limit, num_select)


def patches_left(patches: int, keep_rate: float, reductions: int) -> int:
    """Patches that stand after some reductions, the token of the others counted as one of them."""
    for _ in range(reductions):
        patches = math.ceil(keep_rate * patches)
    return patches + (reductions > 0)


def _size(embed_dim: int, depth: int, num_heads: int, patch_size: int, **more: Any) -> dict[str, Any]:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_dim": 4 * embed_dim}
    return {**sizes, "patch_size": patch_size, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "vit_s16": _size(384, 12, 6, 16),
    "vit_s14": _size(384, 12, 6, 14, layer_scale=1.0),  # DINOv2's shape; a block without weights starts as a plain one
    "vit_b16": _size(768, 12, 12, 16),
    "vit_b32": _size(768, 12, 12, 32),
    "vit_l16": _size(1024, 24, 16, 16),
    "vit_l32": _size(1024, 24, 16, 32),
    "vit_h14": _size(1280, 32, 16, 14),
    "r50_vit_b16": _size(768, 12, 12, 16, backbone="r50"),
}

AUTHORS_NAMES = {
    "ViT-B_16": "vit_b16",
    "ViT-B_32": "vit_b32",
    "ViT-L_16": "vit_l16",
    "ViT-L_32": "vit_l32",
    "ViT-H_14": "vit_h14",
    "R50-ViT-B_16": "r50_vit_b16",
}


def make_config(name: str, **overrides: Any) -> FFVTConfig:
    """The configuration of a preset (or of one of the authors' names), with fields replaced.

    Raises:
        ValueError: an unknown preset, an unknown field, or a value that does not hold; the message names it.
    """
    preset = PRESETS.get(AUTHORS_NAMES.get(name, name))
    if preset is None:
        known = ", ".join([*PRESETS, *AUTHORS_NAMES])
        raise ValueError(f"create_model: name must be one of {known}; got name={printable(repr(name))}")
    return FFVTConfig(**{**preset, **_known_fields("create_model", overrides)})


def replace_fields(where: str, config: FFVTConfig, overrides: Mapping[str, Any]) -> FFVTConfig:
    """A configuration with other values of some fields.

    Raises:
        ValueError: an unknown field, or a value that does not hold; the message names it.
    """
    return replace(config, **_known_fields(where, overrides))


def _known_fields(where: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    known = {declared.name for declared in fields(FFVTConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        must = f"FFVTConfig fields ({', '.join(sorted(known))})"
        raise ValueError(f"{where}: overrides must be {must}; got {printable(repr(unknown))}")
    return {name: _plain(value) for name, value in overrides.items()}


def _plain(value: Any) -> Any:
    """NumPy's integers as Python's, which JSON knows."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
