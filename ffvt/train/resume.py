"""Where a run starts: at a checkpoint, or anew; and whether that checkpoint fits."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ffvt.errors import printable, require
from ffvt.files import clear, write_whole
from ffvt.train.checkpoint import FACTS_FILE, STATE_FILE, SUMS_FILE, newest_whole, verify_checkpoint
from ffvt.train.contents import read_facts, read_state
from ffvt.train.data import Data
from ffvt.train.data_record import changes
from ffvt.train.options import TrainOptions

log = logging.getLogger("ffvt")

LAUNCH_FILE = ".launch"  # in a run's folder: which torchrun began it
FREE_OPTIONS = ("name", "output_dir", "resume", "overwrite", "strict")  # may change without a word on resuming
NEUTRAL_OPTIONS = (  # change nothing in the result of a run that is resumed
    "data_root",
    "image_root",
    "cache_dir",
    "workers",
    "prefetch",
    "pretrained_dir",
    "max_skipped_steps",
    "rendezvous_timeout",
    "skip_bad_images",
    "save_every",
    "log_every",
    "tensorboard",
)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the checkpoint, or None.
        is_own: whether that is one of the run's own.
        is_restart: whether torchrun started the processes again after one of them died.
    """

    checkpoint: Path | None
    is_own: bool
    is_restart: bool


def find_start(options: TrainOptions, run: Path) -> Start:
    """Finds where to start.

    Processes that torchrun started again resume from what the run has; if that is nothing yet, they begin as they did.

    Raises:
        ValueError: `resume` leads to no checkpoint, or to damaged ones only.
    """
    launch = launch_token()
    is_restart = launch is not None and _noted_launch(run) == launch.encode()
    if is_restart or options.resume == "auto":
        own = newest_whole(run)
        if own is not None:
            return Start(own, True, is_restart)
    if options.resume == "auto":
        log.warning("%s has no checkpoint yet: a new run", run)
    if options.resume in ("", "auto"):
        return Start(None, False, is_restart)
    checkpoint = _checkpoint_in(Path(options.resume))
    if checkpoint is None:
        raise ValueError(f"train: resume must be auto or lead to a checkpoint; got resume={options.resume!r}")
    is_own = checkpoint.parent == Path(os.path.realpath(run)) and bool(re.fullmatch(r"step-\d{8}", checkpoint.name))
    if not is_own and Path(os.path.realpath(run)) in checkpoint.parents:
        raise ValueError(f"train: name must not be that of the run in which resume={options.resume!r} lies")
    return Start(run / checkpoint.name if is_own else checkpoint, is_own, is_restart)


def _checkpoint_in(folder: Path) -> Path | None:
    """The folder itself where it is a checkpoint (which must be whole), else the newest whole one of the run in it."""
    folder = Path(os.path.realpath(folder))
    if (folder / SUMS_FILE).exists():
        verify_checkpoint(folder)
        return folder
    return newest_whole(folder)


def _noted_launch(run: Path) -> bytes:
    noted = run / LAUNCH_FILE
    if noted.is_symlink() or not noted.is_file():
        return b""
    with noted.open("rb") as file:
        return file.read(10000)


def note_launch(run: Path) -> None:
    """Notes in a run's folder which torchrun began it, if one did."""
    launch = launch_token()
    if launch is not None:
        if (run / LAUNCH_FILE).is_symlink():
            clear(run / LAUNCH_FILE)  # what it leads to is not ours
        write_whole(run / LAUNCH_FILE, launch.encode())


def launch_token() -> str | None:
    """Which torchrun started this process: its host, number and time of start; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = os.getppid()
    facts = Path(f"/proc/{agent}/stat")
    started = facts.read_text().rpartition(")")[2].split()[19] if facts.exists() else ""
    return f"{socket.gethostname()} {agent} {started}"


def check_fit(checkpoint: Path, options: TrainOptions, data: Data, world_size: int) -> None:
    """Names the options and the data in which this run differs from the one that wrote the checkpoint.

    Raises:
        ValueError: it has other classes, or more steps behind it than this run is to have; or, with `strict`, it
            differs in what changes the result.
    """
    facts, state = read_facts(checkpoint / FACTS_FILE), read_state(checkpoint / STATE_FILE)
    step, named = state["step"], re.fullmatch(r"step-(\d{8})", checkpoint.name)
    if facts["step"] != step or (named and int(named[1]) != step):
        raise ValueError(f"checkpoint: {checkpoint} must be of one step; got {facts['step']} and {step} in its files")
    if facts["classes"] != data.classes:
        raise ValueError(f"train: classes must be the checkpoint's; got {_few(data.classes)}")
    batch, now = facts["options"].get("train_batch_size"), options.train_batch_size * world_size
    if options.epochs is not None and batch is not None:
        before = batch * state["world_size"]
        require(now == before, "train", "train_batch_size * processes", f"the checkpoint's {before} with epochs", now)
    if step > options.num_steps:
        raise ValueError(
            f"train: num_steps must be at least the checkpoint's {step}; got num_steps={options.num_steps}"
        )
    options_changed = _changed_options(facts["options"], options)
    for name in ("mean", "std"):  # they may hang on pretrained_dir
        earlier, now = facts.get(name), list(getattr(data.recipe, name))
        if earlier not in (None, now):
            options_changed[name] = printable(f"{earlier} -> {now}")
    data_changed = changes(facts.get("data", {}), data.record)
    if options.strict:
        _refuse_changes(options_changed, data_changed, state["world_size"], world_size)
    if options_changed:
        told = "; ".join(f"{name}: {change}" for name, change in options_changed.items())
        log.warning("resuming with other options than the checkpoint's: %s", told)
    if data_changed:
        log.warning("resuming with other data than the checkpoint's: %s", "; ".join(data_changed))


def _few(classes: Sequence[str]) -> str:
    return f"{printable(str(classes[:3]))} and so on"


def _changed_options(before: Mapping[str, Any], options: TrainOptions) -> dict[str, str]:
    """The options that differ, with both values; one that the checkpoint's version had not stood at its default."""
    changed = {}
    for declared in fields(options):
        name, now = declared.name, getattr(options, declared.name)
        earlier = before.get(name, declared.default)
        if name not in FREE_OPTIONS and _plain(earlier) != _plain(now):
            changed[name] = printable(f"{earlier} -> {now}")
    return changed


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _refuse_changes(options: Mapping[str, str], data: Sequence[str], size_before: int, size_now: int) -> None:
    told = [f"{name}: {change}" for name, change in options.items() if name not in NEUTRAL_OPTIONS]
    if size_before != size_now:
        told.append(f"processes: {size_before} -> {size_now}")
    if told or data:
        raise ValueError(f"train: strict must find options and data unchanged; got {'; '.join([*told, *data])}")
