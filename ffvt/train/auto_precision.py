"""What --precision auto means: a resumed run keeps its checkpoint's precision, a new one takes the fastest here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffvt.errors import require
from ffvt.precision import AUTO, PRECISIONS
from ffvt.rates import fastest_precision
from ffvt.train.checkpoint import FACTS_FILE
from ffvt.train.contents import read_facts
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions

log = logging.getLogger("ffvt")


def settle_precision(
    options: TrainOptions, checkpoint: Path | None, rates: Mapping[str, float], world: World
) -> TrainOptions:
    """The options with a precision in the place of auto, on which the main rank decides for all.

    Args:
        options: as given.
        checkpoint: what the run resumes from, or None.
        rates: FLOP/s of matrix products by precision, the same on all ranks.
        world: the ranks, all of which call this.

    Raises:
        ValueError: the device has no products in the precision, or the checkpoint's does not go with other options.
    """
    if options.precision == AUTO:
        options = replace(options, **world.on_main(lambda: _settled(options, checkpoint, rates, world.device.type)))
    can = f"one of {', '.join(rates)}, in which this device multiplies"
    require(options.autocast_precision in rates, "train", "precision", can, options.autocast_precision)
    return options


def _settled(options: TrainOptions, checkpoint: Path | None, rates: Mapping[str, float], device: str) -> dict[str, Any]:
    """The values of `precision` and, of a checkpoint, `fp16`."""
    fastest = fastest_precision(rates, device, options.fsdp)
    if checkpoint is None:
        log.info("precision: auto takes %s", fastest)
        return {"precision": fastest}
    before = read_facts(checkpoint / FACTS_FILE)["options"]
    kept = {"precision": before.get("precision", "fp32"), "fp16": before.get("fp16", False)}
    is_one = kept["precision"] in PRECISIONS
    require(is_one, "checkpoint", "precision", f"one of {', '.join(PRECISIONS)}", kept["precision"])
    own = replace(options, **kept).autocast_precision
    if own == fastest:
        log.info("precision: auto keeps the checkpoint's %s", own)
    else:
        log.warning("precision: auto keeps the checkpoint's %s, though %s trains fastest here", own, fastest)
    return kept
