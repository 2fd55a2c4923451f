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
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ffvt.errors import printable
from ffvt.files import clear, file_digest, new_folder, point, remove, set_aside
from ffvt.model.hub import CONFIG_FILE, WEIGHTS_FILE
from ffvt.model.registry import load_pretrained
from ffvt.train.contents import check_same, described, described_file, read_facts, read_state, read_tensors

log = logging.getLogger("ffvt")

FACTS_FILE, SUMS_FILE = "training.json", "SHA256SUMS"
TENSORS_FILE, STATE_FILE = "state.safetensors", "state.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, FACTS_FILE, TENSORS_FILE, STATE_FILE)
KEPT = 2  # newest checkpoints, beside the best
SAVE_ERRORS = (OSError, SafetensorError)  # what a full disk raises
LINKS = ("best", "last")  # in a run's folder; the better one first
LONGEST_SUMS = 10000  # bytes of SHA256SUMS, of which five lines take 400


@dataclass
class Checkpoint:
    """A model and its facts: "classes", "resize_size", "options", "step", and the score: "top1", "top5", "loss", ...

    folder: the checkpoint's own, also where a run's folder was asked for.
    """

    model: nn.Module
    facts: dict[str, Any]
    folder: Path


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

    save_model writes model.safetensors and config.json into a folder. On an error all earlier checkpoints stay. One of
    those that cannot be deleted stays too, which is a warning: the new one is written all the same.

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
    keep = {folder.name, *(link.readlink().name for link in _links(run) if link.is_symlink())}
    for old in checkpoints(run)[KEPT:]:
        if old.name not in keep:
            _discard(old)
    return folder


def _links(run: Path) -> list[Path]:
    return [run / name for name in LINKS]


def discard_run(run: Path) -> None:
    """Deletes the checkpoints of an earlier run, the links to them, and what an interrupted save left; nothing else."""
    for link in _links(run):
        if link.is_symlink():
            link.unlink()
    for folder in checkpoints(run):
        if not _discard(folder):  # or the new run would take it for its own
            set_aside(folder, f"kept-{folder.name}")
    _discard_leftovers(run)


def _discard_leftovers(run: Path) -> None:
    for leftover in (*run.glob(".step-*.new"), *run.glob(".step-*.old*")):
        try:
            clear(leftover)
        except OSError as error:
            _warn_once(leftover, error)


def _discard(folder: Path) -> bool:
    """Deletes a checkpoint; what is none, or has other files in it, is renamed. Whether it is away."""
    try:
        is_whole_folder = folder.is_dir() and not folder.is_symlink()
        if is_whole_folder and {path.name for path in folder.iterdir()} <= {*FILES, SUMS_FILE}:
            if not os.access(folder, os.W_OK, effective_ids=True):  # it would end half deleted
                raise PermissionError("it is write-protected")
            remove(folder)
        else:
            set_aside(folder, f"kept-{folder.name}")
    except OSError as error:
        _warn_once(folder, error)
        return not os.path.lexists(folder)
    return True


_warned: set[Path] = set()  # a folder that cannot be deleted is tried again after every save, and told of once


def _warn_once(folder: Path, error: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        log.warning("an old checkpoint cannot be deleted and stays: %s: %s", folder, error)


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
    if not _is_checkpoint(folder):
        raise FileNotFoundError(f"checkpoint must be a folder with {FACTS_FILE}; got {printable(str(folder))!r}")
    wrong = _wrong_files(folder)
    if wrong:
        raise ValueError(f"checkpoint: {printable(str(folder))} is damaged: {printable(wrong)}")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / FACTS_FILE).exists() or (folder / SUMS_FILE).exists()


def _wrong_files(folder: Path) -> str:
    """What does not fit its checksum, or has none; "" where all is well. Only files of ours are opened."""
    for name in (SUMS_FILE, *FILES):
        if not (folder / name).is_file():
            return f"{name} is not a file" if os.path.lexists(folder / name) else f"{name} is missing"
    with (folder / SUMS_FILE).open("rb") as file:
        content = file.read(LONGEST_SUMS + 1)
    lines = [re.fullmatch(rb"([0-9a-f]{64})  ([a-z.]+)", line) for line in content.split(b"\n")[:-1]]
    if len(content) > LONGEST_SUMS or not content.endswith(b"\n") or None in lines:
        return f"{SUMS_FILE} does not fit"
    sums = {line[2].decode(): line[1].decode() for line in lines}
    if sorted(sums) != sorted(FILES) or len(lines) != len(FILES):
        return f"{SUMS_FILE} does not fit: it names {', '.join(line[2].decode() for line in lines)}"
    try:
        wrong = [name for name in FILES if file_digest(folder / name) != sums[name]]
    except OSError as error:
        return str(error)
    return f"{', '.join(wrong)} does not fit" if wrong else ""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path leads to: the folder itself, or of a run's folder best/, else last/, else its newest.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path)
    for found in (folder, *_links(folder), *checkpoints(folder)[:1]):
        if _is_checkpoint(found):
            return found
    raise FileNotFoundError(
        f"checkpoint must be a folder with {FACTS_FILE}, or a run's folder with best/ or last/ in it; "
        f"got {printable(str(path))!r}"
    )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The model and facts of a checkpoint, on the CPU.

    path: `.../best`, `.../last` or `.../step-...`, or the run's folder (`find_checkpoint`).

    Raises:
        FileNotFoundError: no such checkpoint. ValueError: it is damaged, or not what a run writes.
    """
    folder = Path(os.path.realpath(find_checkpoint(path)))  # a run that goes on may point its links elsewhere meanwhile
    verify_checkpoint(folder)
    facts = read_facts(folder / FACTS_FILE)
    weights = described_file(folder / WEIGHTS_FILE)
    if not weights:
        raise ValueError(f"checkpoint: {folder / WEIGHTS_FILE} must hold a model; got no tensors")
    model = load_pretrained(folder)
    if len(facts["classes"]) != model.config.num_classes:
        classes = len(facts["classes"])
        raise ValueError(f"checkpoint: {folder} names {classes} classes, its model has {model.config.num_classes}")
    check_same(WEIGHTS_FILE, f"checkpoint: {folder}: the model", described(model.state_dict()), weights)
    return Checkpoint(model, facts, folder)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint, verified before, has for resuming: the evaluated model, all other tensors, the plain state.

    Raises:
        ValueError: it is not what a run writes.
    """
    return (
        read_tensors(folder / WEIGHTS_FILE),
        read_tensors(folder / TENSORS_FILE),
        read_state(folder / STATE_FILE),
    )
