"""Weights for a timm ViT that is trained: timm's own files, and ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffvt.errors import printable, require
from ffvt.model.config import LAST_BLOCKS
from ffvt.model.selection import SelectingModel
from ffvt.model.timm_base import OfTimm
from ffvt.model.weights import LoadReport, read_tensors

NAME = "load_weights"


def load_timm_weights(model: OfTimm, source: str | Path | Mapping[str, Any], last_block: str = "random") -> LoadReport:
    """`ffvt.load_weights` into a model made of a timm ViT.

    Args:
        model: the model.
        source: weights of its architecture, in any layout that timm itself reads (positions and patches of other sizes
            are resampled by timm), or what `save_pretrained` wrote of such a model; no other layout. Partial mappings
            are fine, the rest stays as it is, and so does a head of another shape.
        last_block: "random" leaves the fusion block and the norm behind it as they are, as the authors do, unless the
            source is of a fused model; "pretrained" takes both from the source's last block.

    Raises:
        ValueError: an unreadable source, or one of another architecture. FileNotFoundError: no such file.
    """
    require(last_block in LAST_BLOCKS, NAME, "last_block", " or ".join(map(repr, LAST_BLOCKS)), last_block)
    entries, others = read_tensors(model, source)
    is_ours = any(name.startswith("vit.") for name in entries)
    is_fused = is_ours and any(name.startswith("head.") for name in entries)  # a plain one has timm's, vit.head.
    entries = {name.removeprefix("vit."): value for name, value in entries.items()}
    found = _translate(model, entries)
    own = {name.removeprefix("vit."): tensor for name, tensor in model.state_dict().items()}
    at_random = () if is_fused or last_block == "pretrained" else _fusion_names(model)
    report = LoadReport("ours of a timm model" if is_ours else "timm")
    report.ignored = {name: f"no floating-point tensor but {kind}" for name, kind in others.items()}
    place = _place(found, own, at_random, report)
    with torch.no_grad():
        for name, value in place.items():
            own[name].copy_(value)
    report.loaded, report.left = list(place), [name for name in own if name not in place]
    report.resized = [name for name in place if name in entries and entries[name].shape != place[name].shape]
    return report


def _place(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], at_random: tuple[str, ...], report: LoadReport
) -> dict[str, Tensor]:
    """Those of `found` that go into the model's `own`; the report gets the others, each with its reason.

    Raises:
        ValueError: it is of another model: other blocks, other shapes, or nothing that the model has.
    """
    place, wrong = {}, []
    for name, value in found.items():
        if name not in own and name.startswith("blocks."):
            wrong.append(f"{name}: the model has no such parameter")
        elif name not in own:
            report.ignored[name] = "the model has no such parameter"
        elif name.startswith(at_random):
            report.ignored[name] = "the fusion block starts at random"
        elif value.shape == own[name].shape:
            place[name] = value
        elif name.startswith("head"):
            report.ignored[name] = f"a head of another shape; the model's has {tuple(own[name].shape)}"
        else:
            wrong.append(f"{name}: {tuple(value.shape)}, the model has {tuple(own[name].shape)}")
    if wrong or not place:
        got = printable("; ".join(wrong) or "none of its names")
        raise ValueError(f"{NAME}: source must hold weights of the model's architecture; got {got}")
    return place


def _translate(model: OfTimm, entries: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """timm's own reading of an architecture's weights: other layouts' names, other sizes of positions and patches."""
    module = sys.modules[type(model.vit).__module__]
    try:
        return module.checkpoint_filter_fn(dict(entries), model.vit)
    except Exception as error:  # whatever it does with names and shapes that are none of its own
        reason = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"{NAME}: source must hold weights that timm can read; got {reason}") from error


def _fusion_names(model: OfTimm) -> tuple[str, ...]:
    """Starts of the names of a fused model's last block and of what is behind it."""
    if not isinstance(model, SelectingModel):
        return ()
    return (f"blocks.{len(model.vit.blocks) - 1}.", "norm.", "fc_norm.")
