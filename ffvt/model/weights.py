"""`load_weights`: any known source -> a model, all or nothing.

Four steps: locate (a name of the Hub, in `hub.py`), read (a file into a flat mapping, in `weight_files.py`), translate
(its names into ours, in `weight_names.py`), and place (check every shape, then copy). Nothing is written before all is
checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffvt.errors import printable
from ffvt.model.config import LAST_BLOCKS, FFVTConfig
from ffvt.model.config_files import check_foreign_config
from ffvt.model.hub import locate
from ffvt.model.weight_files import existing_file, read_weights, state_dict
from ffvt.model.weight_names import is_part_of_model, translate
from ffvt.model.weight_pieces import Piece

MAX_EXPANSION = 8  # a file may unpack to this many times the model's bytes (and to 1 GiB in any case)
Placements = list[tuple[Tensor, Tensor]]  # what is written: destination, value


@dataclass
class LoadReport:
    """What `load_weights` did.

    Attributes:
        format: the layout that was recognised.
        loaded: parameters of the model that were filled whole.
        resized: position grids that were interpolated (also in `loaded`).
        left: parameters that keep their value, or part of it.
        ignored: source entry -> why it was not used.
        cast: dtypes of the source that are not the parameters' own, such as "float16".
    """

    format: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    cast: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "") if names else "none"

        ignored = [printable(f"{name} ({why})") for name, why in self.ignored.items()]
        return (
            f"{self.format}: loaded {len(self.loaded)} parameters; resized: {some(self.resized)}; "
            f"left as they were: {some(self.left)}; ignored: {some(ignored)}"
            + (f"; cast from {', '.join(self.cast)}" if self.cast else "")
        )


def load_own_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], last_block: str = "random"
) -> LoadReport:
    """`ffvt.load_weights` into an `FFVT`, a `TransFG` or a `ViT`.

    Args:
        model: an `ffvt.create_model` model.
        source: in one of these layouts: Google's ViT .npz; the authors' state dict, FFVT's or TransFG's (.bin, .pt,
            .npz, .safetensors); ours; timm's; Hugging Face's ViT, DeiT, DINOv2, MSN and MAE. Our layer norms add 1e-6,
            as Google's and timm's do, also where a Hugging Face configuration says 1e-12. A position grid of another
            size, such as that of overlapping patches, is interpolated as the authors do (bilinear, corners aligned).
        last_block: as for `ffvt.load_weights`, which tells the rest, the errors too. FFVT's fusion block and TransFG's
            part layer are the same part: each fills the other. A TransFG takes the source's final norm with "random"
            too, as its authors do.
    """
    if last_block not in LAST_BLOCKS:
        raise ValueError(
            f"load_weights: last_block must be 'random' or 'pretrained'; got last_block={printable(repr(last_block))}"
        )
    if not isinstance(getattr(model, "config", None), FFVTConfig):
        raise TypeError(
            f"load_weights: model must be one of ffvt.create_model, or a fused one of timm; got {type(model).__name__}"
        )
    use_last = last_block == "pretrained" or model.config.kind == "vit"
    if isinstance(source, Mapping):
        report, placements = _plan(state_dict(source), model, use_last)
    else:
        found = _read(source, model)
        try:
            report, placements = _plan(found, model, use_last)
        except ValueError as error:
            raise ValueError(f"{error} (source {printable(repr(str(source)))})") from error
    with torch.no_grad():
        for target, value in placements:
            target.copy_(value)
    return report


def read_tensors(model: nn.Module, source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The floating-point tensors of a source of `load_weights` by name, and of everything else in it its kind."""
    return _as_tensors(state_dict(source) if isinstance(source, Mapping) else _read(source, model))


def _read(source: str | Path, model: nn.Module) -> Mapping[str, Any]:
    place = locate("load_weights", source)
    path = existing_file("load_weights", place)
    if place.is_dir() and isinstance(model.config, FFVTConfig):
        check_foreign_config("load_weights", place, model.config)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return read_weights("load_weights", path, max(1 << 30, MAX_EXPANSION * own))


def _plan(source: Mapping[str, Any], model: nn.Module, use_last: bool) -> tuple[LoadReport, Placements]:
    """What goes where, all of it checked; the model stays as it is."""
    entries, others = _as_tensors(source)
    try:
        for name, kind in others.items():
            if not entries or is_part_of_model(name, entries, model.config):
                shown = f"{printable(repr(name))}: {kind}"
                raise ValueError(f"load_weights: source must map names to floating-point tensors; got {shown}")
        translation = translate(entries, model.config, use_last)
        ignored = {name: f"no floating-point tensor but {kind}" for name, kind in others.items()}
        report = LoadReport(translation.format, ignored={**translation.ignored, **ignored})
        return report, _check(model, translation.pieces, report)
    except (IndexError, RuntimeError, TypeError) as error:  # a tensor of another rank, sparse, on no device, ...
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"load_weights: source must hold plain tensors of the model's shapes; got {reason}") from error


def _as_tensors(source: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain floating-point tensors of a mapping by name, and of everything else its kind."""
    tensors, others = {}, {}
    for name, value in source.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", str(name))
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8:
            value = torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if plain and value.is_floating_point():
            tensors[name] = value.detach()
        else:
            others[name] = str(getattr(value, "dtype", type(value).__name__))
    return tensors, others


def _check(model: nn.Module, pieces: list[Piece], report: LoadReport) -> Placements:
    """Every (destination, value) pair, shapes checked, and the report's lists filled."""
    parameters = dict(model.named_parameters())
    placements, wrong = [], []
    covered = dict.fromkeys(parameters, 0)
    head_fits = all(
        p.target not in parameters or parameters[p.target].shape == p.value.shape for p in pieces if p.is_head
    )
    for piece in pieces:
        if piece.target not in parameters:
            wrong.append(f"{printable(piece.source)} -> {piece.target}: the model has no such parameter")
            continue
        target = parameters[piece.target]
        destination, value = (target if piece.rows is None else target[piece.rows]), piece.value
        if piece.target == "pos_embed" and value.ndim == 3 and value.shape[2] == target.shape[2]:
            value = resize_positions(value, target.shape[1])
            if value.shape != piece.value.shape:
                report.resized.append(piece.target)
        if piece.is_head and not head_fits:
            report.ignored[piece.source] = f"a head of another shape; the model's has {tuple(target.shape)}"
        elif value.shape != destination.shape:
            found = f"{printable(piece.source)}: {tuple(value.shape)}"
            wrong.append(f"{found}, {piece.target} has {tuple(destination.shape)}")
        else:
            if (
                value.dtype != destination.dtype
                and (name := str(value.dtype).removeprefix("torch.")) not in report.cast
            ):
                report.cast.append(name)
            placements.append((destination, value.to(destination.device, destination.dtype)))
            covered[piece.target] += destination.numel()
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"load_weights: every shape must fit the model; got {'; '.join(wrong[:3])}{more}")
    report.loaded = [name for name, count in covered.items() if count == parameters[name].numel()]
    report.left = [name for name, count in covered.items() if count < parameters[name].numel()]
    return placements


def resize_positions(positions: Tensor, num_tokens: int) -> Tensor:
    """Position embeddings (1, M, C) for another number of tokens, (1, N, C).

    The class token's row stays; the square grid is interpolated bilinearly with corners aligned, which is what the
    authors' `scipy.ndimage.zoom(order=1)` computes. A source without a class row (timm's no_embed_class) gets
    zeros there.

    Raises:
        ValueError: either grid is not square.
    """
    old, channels = positions.shape[1], positions.shape[2]
    old_side, new_side = round(old**0.5), round((num_tokens - 1) ** 0.5)
    if old_side**2 == old:
        positions = torch.cat([positions.new_zeros(1, 1, channels), positions], dim=1)
    else:
        old_side = round((old - 1) ** 0.5)
    if old == 0 or old_side**2 != positions.shape[1] - 1 or new_side**2 != num_tokens - 1:
        raise ValueError(f"load_weights: position grids must be square; got {old} positions for {num_tokens} tokens")
    if old_side == new_side:
        return positions
    class_row, grid = positions[:, :1], positions[:, 1:]
    grid = grid.float().reshape(1, old_side, old_side, channels).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bilinear", align_corners=True)
    return torch.cat([class_row, grid.flatten(2).transpose(1, 2).to(class_row.dtype)], dim=1)
