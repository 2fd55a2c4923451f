"""Whether a checkpoint's tensors are those that a run has: compared before any of them is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffvt.errors import printable, require
from ffvt.model.hub import WEIGHTS_FILE
from ffvt.train.checkpoint import TENSORS_FILE
from ffvt.train.contents import check_same, described
from ffvt.train.distributed import World
from ffvt.train.generators import check_generators

PARTS = ("model", "optimizer", "generator")  # of state.safetensors
OPTIMIZER_STATE = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}  # of every parameter
_COUNT = torch.zeros(())  # what PyTorch keeps as AdamW's "step"


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named prefix/..., without the prefix."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def check_tensors(
    run: nn.Module,
    optimizer: str,
    world: World,
    model: dict[str, Tensor],
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
) -> None:
    """Compares what a checkpoint has with the run's own model, optimiser and generators.

    Args:
        run: the run's model.
        optimizer: the name of its optimiser.
        world: its processes.
        model, tensors, plain: as `load_state` gives them.

    Raises:
        ValueError: a name, a shape or a dtype differs, or the generators do not take their states.
    """
    unknown = [name for name in tensors if name.partition("/")[0] not in PARTS]
    require(not unknown, "resume", TENSORS_FILE, f"made of {', '.join(PARTS)}", printable("".join(unknown[:1])))
    own, trained = described(run.state_dict()), part_of(tensors, "model")
    check_same(WEIGHTS_FILE, "resume: the model", own, described(model))
    if trained:  # beside the moving average
        check_same(TENSORS_FILE, "resume: the model", own, described(trained))
    _check_optimizer(run, optimizer, part_of(tensors, "optimizer"), plain)
    if plain["world_size"] == world.size:  # else new ones are seeded
        states = part_of(tensors, f"generator/{world.rank}")
        check_generators(plain["generators"][world.rank], states, world.device)


def _check_optimizer(run: nn.Module, optimizer: str, given: dict[str, Tensor], plain: dict[str, Any]) -> None:
    kinds, split = OPTIMIZER_STATE[optimizer], {name: name.rpartition("/") for name in given}
    fits = all(kind in kinds for _, _, kind in split.values())
    require(fits, "resume", "optimizer", "the checkpoint's", optimizer)
    count = plain.get("optimizer_tensors", len(given))  # earlier versions did not count them
    complete = len(given) == count
    require(complete, "resume", TENSORS_FILE, f"a file with {count} tensors of the optimiser", len(given))
    stepped = {parameter for parameter, _, _ in split.values()}  # a parameter without gradients has no state
    own = {
        f"{name}/{kind}": _COUNT if kind == "step" else parameter
        for name, parameter in run.named_parameters()
        if name in stepped
        for kind in kinds
    }
    check_same(TENSORS_FILE, "resume: the optimiser", described(own), described(given))
    for name in (name for name in given if name.endswith("/step")):
        steps = given[name].item()
        require(0 <= steps <= plain["step"], "resume", name, f"from 0 to {plain['step']} steps", steps)
