"""What the files of a checkpoint hold: one table per JSON file, and which tensors a run takes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ffvt.errors import printable
from ffvt.model.weight_files import read_header
from ffvt.train.kinds import (
    Kind,
    Unfit,
    anything,
    array,
    flag,
    integer,
    number,
    only,
    optional,
    read_json,
    record,
    row,
    text,
)
from ffvt.train.options import TrainOptions

LARGEST_SIDE = 8192  # pixels to which an image is resized, which takes 200 MB
_DTYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}
MOST_VALUES = 1000  # of an option that takes any number
LAST_STEP = 10**8 - 1  # folders have names of eight digits

_SHARE, _STEPS = number(0, 1 + 1e-9), integer(0, LAST_STEP)
_CHANNELS = array(number(), 3, 3)  # what of them is usable, `Recipe` says
_SELECTION = record(
    {
        "class_token_rate": _SHARE,
        "layer_overlap": optional(_SHARE),
        "hit_rate": optional(_SHARE),
        "random_hit_rate": optional(_SHARE),
    },
    may={"layer_hit_rates": optional(array(_SHARE, 1, 10000))},
)
_SCORE = {
    "count": integer(1),
    "top1": _SHARE,
    "top5": _SHARE,
    "loss": optional(number()),
    "mean_class_top1": _SHARE,
    "selection": optional(_SELECTION),
}
_SPLIT = record({"count": integer(), "files": text(64)}, may={"contents": text(64)})
_KIND_OF_OPTION = {bool: flag, int: integer(-(2**63), 2**63 - 1), float: number(), str: text(4096)}


def _option(declared: Any) -> Kind:
    kind = _KIND_OF_OPTION.get(declared.metadata["kind"], anything)
    count = declared.metadata["count"]
    if count:
        return array(kind, 0, MOST_VALUES if count == "+" else count)
    return optional(kind) if declared.default is None else kind


_OPTIONS = {declared.name: _option(declared) for declared in fields(TrainOptions)}
_NEEDED_OPTIONS = ("dataset", "data_root", "preset", "seed")  # to open the data set again
FACTS = record(
    {
        "classes": array(text(), 1, 2**20),
        "resize_size": integer(1, LARGEST_SIDE),
        "options": record({name: _OPTIONS[name] for name in _NEEDED_OPTIONS}, _OPTIONS, others=anything),
        "step": _STEPS,
    },
    may={**_SCORE, "data": record({}, others=_SPLIT), "mean": _CHANNELS, "std": _CHANNELS},
    others=anything,  # for people; nothing here reads it
)

_WORD = integer(0, 2**32 - 1)
_PYTHON_GENERATOR = row(integer(3, 3), row(*[_WORD] * 624, integer(0, 624)), optional(number()))
_NUMPY_GENERATOR = row(only("MT19937"), array(_WORD, 624, 624), integer(0, 624), integer(0, 1), number())
_SCALER = {
    "scale": number(1e-300, 1e300),
    "growth_factor": number(1, 1e6),
    "backoff_factor": number(1e-6, 1),
    "growth_interval": integer(1),
    "_growth_tracker": integer(),
}
STATE = record(
    {
        "step": _STEPS,
        "samples": integer(),
        "skipped": _STEPS,
        "skipped_in_a_row": _STEPS,
        "best_step": _STEPS,
        "evaluated_step": _STEPS,
        "world_size": integer(1, 2**16),
        "schedule_steps": _STEPS,
        "scaler": record({}, may=_SCALER),
        "averaged_steps": _STEPS,
        "meter": array(number(0), 5, 6),  # older versions knew no contrastive loss
        "last": optional(record(_SCORE)),
        "best": optional(record(_SCORE)),
        "generators": array(record({"python": _PYTHON_GENERATOR, "numpy": _NUMPY_GENERATOR}), 1, 2**16),
    },
    may={"optimizer_tensors": integer(), "cpu_products": optional(only("bf16", "fp32"))},
)
_NOT_ABOVE = {  # counter -> the counter that it cannot exceed
    "skipped": "step",
    "skipped_in_a_row": "skipped",
    "best_step": "step",
    "evaluated_step": "step",
    "schedule_steps": "step",
    "averaged_steps": "step",
    "step": "samples",
}


def read_facts(path: Path) -> dict[str, Any]:
    """The facts in a checkpoint's training.json.

    Raises:
        ValueError: they are not what a run writes; the message names file and key.
    """
    return read_json(path, FACTS)


def read_state(path: Path) -> dict[str, Any]:
    """The plain state in a checkpoint's state.json.

    Raises:
        ValueError: it is not what a run writes; the message names file and key.
    """
    return read_json(path, _consistent_state)


def _consistent_state(key: str, state: Any) -> None:
    STATE(key, state)
    for name, limit in _NOT_ABOVE.items():
        integer(0, state[limit])(name, state[name])
    for score, step in (("best", "best_step"), ("last", "evaluated_step")):
        if (state[score] is None) != (state[step] == 0):
            raise Unfit(step, f"0 without a score {score!r} and only then", state[step])
    size = state["world_size"]
    array(anything, size, size)("generators", state["generators"])
    if state["scaler"]:
        record(_SCALER)("scaler", state["scaler"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: it is none.
    """
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} must be a safetensors file; got {printable(str(error))}") from error


def described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype and shape of each tensor, as `check_same` compares them."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}


def described_file(path: Path) -> dict[str, str]:
    """The same of the tensors in a safetensors file, of which only the header is read.

    Raises:
        ValueError: it is none.
    """
    header = read_header("checkpoint", path)
    return {name: f"{_DTYPES.get(dtype, dtype)} {shape}" for name, (dtype, shape) in header.items()}


def check_same(file: str, what: str, own: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Compares the tensors of a file with those that are to take them, by name, shape and dtype.

    Raises:
        ValueError: they differ; the message names the first one that does.
    """
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        here, there = (tensors.get(wrong[0], "none") for tensors in (own, given))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"{what} must be the checkpoint's; it differs in {printable(wrong[0])}{more} of {file}: "
            f"{there} there, {here} here"
        )
