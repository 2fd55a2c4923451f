"""Where a run starts: at a checkpoint, or anew in a folder made ready for it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from ffvt.train.checkpoint import FACTS_FILE, checkpoints, discard_run, newest_whole, set_aside_newer, verify_checkpoint
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import LOG_FILE

log = logging.getLogger("ffvt")


def prepare(options: TrainOptions, folder: Path) -> Path | None:
    """The checkpoint to go on from; without one `folder` is made ready for a new run.

    An earlier run in the folder is kept as <name>.1, <name>.2, ..., unless it is to be overwritten. A worker that
    torchrun started again after a failure goes on from what the run has.

    Raises:
        ValueError: `resume` leads to no checkpoint, or to damaged ones only.
    """
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    wanted = "auto" if is_restart else options.resume
    checkpoint = _checkpoint_in(folder if wanted == "auto" else Path(wanted)) if wanted else None
    if checkpoint is None and wanted and wanted != "auto":
        raise ValueError(f"train: resume must be auto or lead to a checkpoint; got resume={wanted!r}")
    if checkpoint is not None and is_of_run(checkpoint, folder):
        set_aside_newer(folder, int(checkpoint.name.removeprefix("step-")))
        return checkpoint
    if wanted == "auto":
        log.warning("%s has no checkpoint yet: a new run", folder)
    if options.overwrite or is_restart:
        discard_run(folder)
    else:
        _keep_earlier_run(folder)
    return checkpoint


def is_of_run(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in `folder`."""
    return checkpoint.parent.resolve() == folder.resolve()


def warn_of_changes(checkpoint: Path, options: TrainOptions) -> None:
    """Names the options in which this run differs from the one that wrote the checkpoint."""
    before = json.loads((checkpoint / FACTS_FILE).read_text())["options"]
    now = options.to_dict()
    free = ("name", "output_dir", "resume", "overwrite")
    changed = [
        f"{key}: {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]
    ]
    if changed:
        log.warning("resuming with other options than the checkpoint's: %s", "; ".join(changed))


def _checkpoint_in(folder: Path) -> Path | None:
    """The folder itself where it is a checkpoint (which must be whole), else the newest whole one of the run in it."""
    if folder.is_symlink():
        folder = folder.parent / folder.readlink()
    if folder.name.startswith("step-"):
        verify_checkpoint(folder)
        return folder
    return newest_whole(folder)


def _keep_earlier_run(folder: Path) -> None:
    if not (folder / LOG_FILE).exists() and not checkpoints(folder):
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    kept = folder.with_name(f"{folder.name}.{number}")
    folder.rename(kept)
    log.warning("the earlier run %s is kept as %s", folder, kept)
