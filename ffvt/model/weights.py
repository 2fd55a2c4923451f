"""`load_weights`: any known source -> a model, all or nothing.

Three steps, each its own function: read (a file into a flat mapping, never running its pickles), translate (its names
into ours, in `weight_names.py`), and place (check every shape, then copy). Nothing is written before all is checked.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffvt.errors import printable
from ffvt.model.config import LAST_BLOCKS, FFVTConfig
from ffvt.model.weight_names import Piece, is_part_of_model, translate

MAX_EXPANSION = 8  # a file may unpack to this many times the model's bytes (and to 1 GiB in any case)


@dataclass
class LoadReport:
    """What `load_weights` did.

    Attributes:
        format: the layout that was recognised.
        loaded: parameters of the model that were filled whole.
        resized: position grids that were interpolated (also in `loaded`).
        left: parameters that keep their value, or part of it.
        ignored: source entry -> why it was not used.
    """

    format: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "") if names else "none"

        ignored = [f"{name} ({why})" for name, why in self.ignored.items()]
        return (
            f"{self.format}: loaded {len(self.loaded)} parameters; resized: {some(self.resized)}; "
            f"left as they were: {some(self.left)}; ignored: {some(ignored)}"
        )


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], last_block: str = "random") -> LoadReport:
    """Loads weights into an `FFVT` or a `ViT`, in place; on any error the model is unchanged.

    Args:
        model: an `ffvt.create_model` model.
        source: a path, a folder written by `save_pretrained`, or a mapping of names to tensors or arrays. Recognised by
            content: Google's ViT .npz; the authors' state dict (.bin, .pt, .npz, .safetensors); ours; timm's. Partial
            mappings are fine, the rest stays as it is. A position grid of another size is interpolated as the authors
            do (bilinear, corners aligned). The head is loaded where its shape fits, else it stays.
        last_block: "random" leaves the fusion block and the final norm as they are, as the authors do, unless the
            source has a fusion block of its own; "pretrained" takes both from the source's last block and norm.
            A plain ViT (feature_fusion=False) always takes them.

    Returns:
        LoadReport: loaded, resized, left, ignored.

    Raises:
        FileNotFoundError: no such path.
        TypeError: model is no ffvt model.
        ValueError: an unreadable, truncated, unrecognised or pickled source, a shape that does not fit, or an unknown
            `last_block`. Pickles are never run.
    """
    if last_block not in LAST_BLOCKS:
        raise ValueError(f"load_weights: last_block must be 'random' or 'pretrained'; got last_block={last_block!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(getattr(model, "config", None), FFVTConfig):
        raise TypeError(f"load_weights: model must be an ffvt.FFVT or ffvt.ViT; got {type(model).__name__}")
    entries, others = read_tensors(model, source)
    use_last = last_block == "pretrained" or not model.config.feature_fusion
    try:
        for name, kind in others.items():
            if not entries or is_part_of_model(name, entries, model.config):
                raise ValueError(f"load_weights: source must map names to floating-point tensors; got {name!r}: {kind}")
        translation = translate(entries, model.config, use_last)
        ignored = {name: f"no floating-point tensor but {kind}" for name, kind in others.items()}
        report = LoadReport(translation.format, ignored={**translation.ignored, **ignored})
        placements = _check(model, translation.pieces, report)
    except (IndexError, RuntimeError, TypeError) as error:  # a tensor of another rank, sparse, on no device, ...
        raise ValueError(f"load_weights: source must hold plain tensors of the model's shapes; got {error}") from error
    with torch.no_grad():
        for target, value in placements:
            target.copy_(value)
    return report


def read_tensors(model: nn.Module, source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The floating-point tensors of a source of `load_weights` by name, and of everything else in it its kind."""
    return _as_tensors(_state_dict(source) if isinstance(source, Mapping) else _read(Path(source), model))


def _read(path: Path, model: nn.Module) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"load_weights: source must be an existing file; got source={str(path)!r}")
    try:
        return _read_by_content(path, model)
    except Exception as error:  # every reader has errors of its own: one kind goes out, with the cause in it
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"load_weights: source must be a readable weight file; got {str(path)!r}: {reason}") from error


def _read_by_content(path: Path, model: nn.Module) -> Mapping[str, Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked = sum(member.file_size for member in archive.infolist())
        limit = max(1 << 30, MAX_EXPANSION * sum(p.numel() * 4 for p in model.parameters()))
        if unpacked > limit:
            raise ValueError(f"unpacks to {unpacked} bytes, more than {limit}")
        if any(name.endswith(".npy") for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True))
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return load_file(path)
    return _state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _state_dict(loaded: Any) -> Mapping[str, Any]:
    """The state dict in what `torch.load` returned: itself, or nested under a usual name."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"holds a {type(loaded).__name__}, not a mapping of names to tensors")
    return loaded


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


def _check(model: nn.Module, pieces: list[Piece], report: LoadReport) -> list[tuple[Tensor, Tensor]]:
    """Every (destination, value) pair, shapes checked, and the report's lists filled."""
    parameters = dict(model.named_parameters())
    placements, wrong = [], []
    covered = dict.fromkeys(parameters, 0)
    head_fits = all(
        p.target not in parameters or parameters[p.target].shape == p.value.shape for p in pieces if p.is_head
    )
    for piece in pieces:
        if piece.target not in parameters:
            wrong.append(f"{piece.source} -> {piece.target}: the model has no such parameter")
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
            wrong.append(f"{piece.source}: {tuple(value.shape)}, {piece.target} has {tuple(destination.shape)}")
        else:
            placements.append((destination, value.to(destination.device, destination.dtype)))
            covered[piece.target] += destination.numel()
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(f"load_weights: every shape must fit the model; got {'; '.join(wrong[:5])}{more}")
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
