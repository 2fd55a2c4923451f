"""What ranks must have in common: else they would train nonsense, or wait for each other for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ffvt.errors import printable
from ffvt.train.data import Data
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from ffvt.version import __version__

# Options that each rank may have of its own: where its machine has its files, and how it loads them.
OWN = ("data_root", "image_root", "cache_dir", "pretrained_dir", "workers", "prefetch", "rendezvous_timeout")


def check_options(options: TrainOptions, world: World) -> None:
    """Refuses ranks of other options, or of other code.

    Raises:
        ValueError: on every rank.
    """
    versions = {"the version of ffvt": __version__, "the version of torch": torch.__version__}
    check_same(world, {name: value for name, value in options.to_dict().items() if name not in OWN} | versions)


def check_data(data: Data, world: World) -> None:
    """Refuses ranks with other images or classes.

    Raises:
        ValueError: on every rank.
    """
    facts: dict[str, Any] = {"the number of classes": len(data.classes)}
    facts |= {f"class {number}": name for number, name in enumerate(data.classes)}
    for kind, view in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        facts[f"the number of {kind} images"] = len(view)
        facts[f"the digest of the {kind} labels"] = _digest(list(map(int, view.images.labels)))
    check_same(world, facts)


def check_same(world: World, facts: Mapping[str, Any]) -> None:
    """Refuses facts that are not the same on all ranks; the message names the first one, and who has what.

    Raises:
        ValueError: on every rank.
    """
    if world.size == 1:
        return
    of_main = world.on_main(lambda: dict(facts))
    other = next((name for name in of_main | facts if of_main.get(name) != facts.get(name)), None)
    found = [(rank, given) for rank, given in enumerate(world.gather(other and (other, facts.get(other)))) if given]
    if found:
        rank, (name, value) = found[0]
        error = ValueError(
            f"train: {name} must be the same on all ranks; got {_shown(of_main.get(name))} on rank 0, "
            f"{_shown(value)} on rank {rank}"
        )
        error.of_rank = 0
        raise error


def _shown(value: Any) -> str:
    return printable(repr(value), 100)


def _digest(labels: list[int]) -> str:
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]
