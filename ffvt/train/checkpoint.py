"""Checkpoints: folders `step-<number>` that hold a model and all that is needed to resume exactly from it.

    model.safetensors, config.json   the model as it is evaluated; what `load_pretrained` reads
    training.json                    facts for people and tools: classes, options, step, score
    state.safetensors, state.json    optimiser, schedule, scaler, random generators, position in the data: for resuming
    SHA256SUMS                       of all of these (`sha256sum --check SHA256SUMS` works)

A folder appears whole, by one rename, after its contents are on disk. Nothing in it is a pickle. `last` and `best` are
symbolic links.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffvt.files import file_digest, new_folder, point, remove, set_aside
from ffvt.model.hub import CONFIG_FILE, WEIGHTS_FILE
from ffvt.model.registry import load_pretrained

log = logging.getLogger("ffvt")

FACTS_FILE, SUMS_FILE = "training.json", "SHA256SUMS"
TENSORS_FILE, STATE_FILE = "state.safetensors", "state.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, FACTS_FILE, TENSORS_FILE, STATE_FILE)
KEPT = 2  # newest checkpoints, beside the best
SAVE_ERRORS = (OSError, SafetensorError)  # what a full disk raises


@dataclass
class Checkpoint:
    """A model and its facts: "classes", "resize_size", "options", "step", and the score: "top1", "top5", "loss", ..."""

    model: nn.Module
    facts: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    save_model: Callable[[Path], None],
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    is_best: bool,
) -> Path:
    """Writes the run's checkpoint of a step, points `last` (and `best`) at it and deletes what is not to be kept.

    save_model writes model.safetensors and config.json into a folder. On an error all earlier checkpoints stay.

    Raises:
        OSError, SafetensorError: it cannot be written. ValueError: a number in facts or state is not finite.
    """
    folder = run / f"step-{step:08d}"
    with new_folder(folder) as fresh:
        save_model(fresh)
        save_file(dict(tensors), fresh / TENSORS_FILE)
        (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
        (fresh / STATE_FILE).write_text(json.dumps(state, allow_nan=False) + "\n")
        for name in (WEIGHTS_FILE, TENSORS_FILE):  # safetensors lets the owner alone read them
            (fresh / name).chmod((fresh / FACTS_FILE).stat().st_mode)
        sums = "".join(f"{file_digest(fresh / name)}  {name}\n" for name in FILES)
        (fresh / SUMS_FILE).write_text(sums)
    point(run / "last", folder)
    if is_best:
        point(run / "best", folder)
    keep = {folder.name, *(link.readlink().name for link in (run / "best", run / "last") if link.is_symlink())}
    for old in checkpoints(run)[KEPT:]:
        if old.name not in keep:
            _discard(old)
    return folder


def discard_run(run: Path) -> None:
    """Deletes the checkpoints of an earlier run, the links to them, and what an interrupted save left; nothing else."""
    for link in (run / "last", run / "best"):
        if link.is_symlink():
            link.unlink()
    for folder in checkpoints(run):
        _discard(folder)
    _discard_leftovers(run)


def _discard_leftovers(run: Path) -> None:
    for leftover in (*run.glob(".step-*.new"), *run.glob(".step-*.old")):
        shutil.rmtree(leftover)


def _discard(folder: Path) -> None:
    """Deletes a checkpoint; a folder with other files in it is not one, and is renamed."""
    if {path.name for path in folder.iterdir()} <= {*FILES, SUMS_FILE}:
        remove(folder)
    else:
        set_aside(folder, f"kept-{folder.name}")


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, newest first, whole or not."""
    return sorted(run.glob("step-" + "[0-9]" * 8), reverse=True)


def newest_whole(run: Path) -> Path | None:
    """The run's newest checkpoint that is whole; None without any. Damaged ones are passed over, which is logged.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for folder in checkpoints(run):
        try:
            verify_checkpoint(folder)
        except (ValueError, OSError) as error:
            damaged.append(folder.name)
            log.warning("%s; going back to the one before it", error)
        else:
            return folder
    if damaged:
        raise ValueError(f"checkpoint: {run} must have one that is whole; got only damaged ones: {', '.join(damaged)}")
    return None


def resume_at(checkpoint: Path, best_step: int) -> bool:
    """Makes a checkpoint the last one of its run; whether the run still has the best one, of step `best_step`.

    Those of later steps are renamed, so that they do not count among the newest: damaged-... or superseded-...
    """
    run = checkpoint.parent
    _discard_leftovers(run)
    for folder in checkpoints(run):
        if folder.name > checkpoint.name:
            set_aside(folder, f"{'superseded' if is_whole(folder) else 'damaged'}-{folder.name}")
    point(run / "last", checkpoint)
    best = run / f"step-{best_step:08d}"
    if is_whole(best):
        point(run / "best", best)
        return True
    if (run / "best").is_symlink():
        (run / "best").unlink()
    return False


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: that folder itself, or of a run's folder the best one, else the last."""
    folder = Path(path)
    places = (folder, folder / "best", folder / "last")
    return next((place for place in places if (place / FACTS_FILE).exists() or (place / SUMS_FILE).exists()), folder)


def is_whole(folder: Path) -> bool:
    """Whether there is a checkpoint, undamaged."""
    try:
        verify_checkpoint(folder)
    except (ValueError, OSError):
        return False
    return True


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with its checksum.

    Raises:
        FileNotFoundError: there is no checkpoint. ValueError: it is damaged.
    """
    if not (folder / FACTS_FILE).exists() and not (folder / SUMS_FILE).exists():
        raise FileNotFoundError(f"checkpoint must be a folder with {FACTS_FILE}; got {str(folder)!r}")
    try:
        lines = (folder / SUMS_FILE).read_bytes().decode().split("\n")
        sums = dict(re.fullmatch(r"([0-9a-f]{64})  (\S+)", line).groups()[::-1] for line in lines[:-1])
        wrong = [name for name in FILES if file_digest(folder / name) != sums.pop(name, None)]
    except (OSError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {folder} is damaged: {error}") from error
    if wrong or sums or lines[-1]:
        raise ValueError(f"checkpoint: {folder} is damaged: {', '.join([*wrong, *sums]) or SUMS_FILE} does not fit")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The model and facts of a checkpoint (`.../last`, `.../best` or `.../step-...`), on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint. ValueError: it is damaged.
    """
    folder = Path(folder)
    verify_checkpoint(folder)
    facts = json.loads((folder / FACTS_FILE).read_text())
    model = load_pretrained(folder)
    if len(facts["classes"]) != model.config.num_classes:
        classes = len(facts["classes"])
        raise ValueError(f"checkpoint: {folder} names {classes} classes, its model has {model.config.num_classes}")
    return Checkpoint(model, facts)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint, verified before, has for resuming: the evaluated model, all other tensors, the plain state."""
    return (
        load_file(folder / WEIGHTS_FILE),
        load_file(folder / TENSORS_FILE),
        json.loads((folder / STATE_FILE).read_text()),
    )
