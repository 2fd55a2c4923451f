"""Where a run starts: at a checkpoint, or anew. Nothing here changes a file."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ffvt.train.checkpoint import FACTS_FILE, STATE_FILE, SUMS_FILE, newest_whole, verify_checkpoint
from ffvt.train.options import TrainOptions

log = logging.getLogger("ffvt")

LAUNCH_FILE = ".launch"  # in a run's folder: which torchrun began it
FREE_OPTIONS = ("name", "output_dir", "resume", "overwrite")  # may change without a word when a run is resumed


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
    is_restart = launch is not None and (run / LAUNCH_FILE).exists() and (run / LAUNCH_FILE).read_text() == launch
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


def launch_token() -> str | None:
    """Which torchrun started this process: its host, number and time of start; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = os.getppid()
    facts = Path(f"/proc/{agent}/stat")
    started = facts.read_text().rpartition(")")[2].split()[19] if facts.exists() else ""
    return f"{socket.gethostname()} {agent} {started}"


def check_fit(checkpoint: Path, options: TrainOptions, classes: Sequence[str]) -> None:
    """Names the options in which this run differs from the one that wrote the checkpoint.

    Raises:
        ValueError: it has other classes, or more steps behind it than this run is to have.
    """
    facts = json.loads((checkpoint / FACTS_FILE).read_text())
    if facts["classes"] != list(classes):
        raise ValueError(f"train: classes must be the checkpoint's; got {list(classes)[:3]} and so on")
    step = json.loads((checkpoint / STATE_FILE).read_text())["step"]
    if step > options.num_steps:
        raise ValueError(
            f"train: num_steps must be at least the checkpoint's {step}; got num_steps={options.num_steps}"
        )
    before, now = TrainOptions().to_dict() | facts["options"], options.to_dict()  # it may lack newer options
    changed = [name for name in now if name not in FREE_OPTIONS and before[name] != now[name]]
    if changed:
        changes = "; ".join(f"{name}: {before[name]} -> {now[name]}" for name in changed)
        log.warning("resuming with other options than the checkpoint's: %s", changes)
