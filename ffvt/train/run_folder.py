"""A run's folder: its lock, the checkpoint that it starts from, its log, and the checkpoints that it writes."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ffvt.data.layouts import canonical_name
from ffvt.errors import printable, require
from ffvt.files import set_aside
from ffvt.train.checkpoint import (
    SAVE_ERRORS,
    Checkpoint,
    checkpoints,
    discard_run,
    is_whole,
    load_checkpoint,
    load_state,
    resume_at,
    save_checkpoint,
)
from ffvt.train.config_file import CONFIG_FILE, config_text
from ffvt.train.data import Data
from ffvt.train.distributed import World
from ffvt.train.lock import only_writer
from ffvt.train.options import TrainOptions
from ffvt.train.resume import Start, check_fit, find_start, note_launch
from ffvt.train.runlog import LOG_FILE, RunLog
from ffvt.train.state import TrainState

log = logging.getLogger("ffvt")


class RunFolder:
    """The folder <output_dir>/<name> of one run, locked while the block runs.

    All ranks call every method; the main one alone writes.

    Attributes:
        path: the folder.
        log: log.jsonl, from `start` on.

    Raises:
        ValueError: at the start of the block, another process writes this run.
    """

    log: RunLog

    def __init__(self, options: TrainOptions, world: World) -> None:
        self.options, self.world = options, world
        self.path = Path(options.output_dir) / options.name
        if self.path.is_symlink():  # two names of one folder are one run
            self.path = Path(os.path.realpath(self.path))
        self._open = ExitStack()  # the lock and the log
        self._saved_best: tuple = (None, 0)  # score and step of the best model that there is a checkpoint of

    def __enter__(self) -> RunFolder:
        with ExitStack() as opened:
            self.world.on_main(lambda: self._acquire(opened))
            self._start = self.world.on_main(lambda: find_start(self.options, self.path))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def _acquire(self, opened: ExitStack) -> None:
        check_apart(self.options, self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        opened.enter_context(only_writer(self.path))

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that `start` will restore, or None."""
        return self._start.checkpoint

    def start(self, state: TrainState, data: Data, facts: dict[str, Any]) -> None:
        """Restores `state` from the checkpoint to resume from, if there is one, and opens the log, which gets `facts`.

        Raises:
            ValueError: the checkpoint is none, is damaged, or does not fit the options, the data or the model.
        """
        options, on_main, start = state.options, self.world.on_main, self._start
        if start.checkpoint is not None:
            on_main(lambda: check_fit(start.checkpoint, options, data, self.world.size))
            state.restore(*load_state(start.checkpoint))
        if not on_main(lambda: self._prepare(start, state.best_step)):
            state.best, state.best_step = None, 0
        self._saved_best = (state.best, state.best_step)
        self.log = RunLog(
            self.path,
            options.name,
            options.num_steps,
            state.step,
            append=start.is_own,
            enabled=self.world.is_main,
            tensorboard=options.tensorboard,
        )
        self._open.callback(self.log.close)
        self.log.write("run", **facts)
        on_main(lambda: self._write_config(options))
        if start.checkpoint is not None:
            self.log.write("resume", step=state.step, checkpoint=str(start.checkpoint))
            if self.world.is_main:
                log.warning("resumed from %s, step %d of %d", start.checkpoint, state.step, options.num_steps)

    def _write_config(self, options: TrainOptions) -> None:
        try:
            (self.path / CONFIG_FILE).write_text(config_text(options), encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written, training continues without it: %s", self.path / CONFIG_FILE, error)

    def _prepare(self, start: Start, best_step: int) -> bool:
        """Makes the folder ready; whether the best checkpoint, of step `best_step`, is in it.

        An earlier run in it is kept as <name>.1, <name>.2, ..., unless it is resumed or is to be overwritten.
        """
        has_best = False  # if there was a best one, then in another run's folder
        if start.is_own:
            has_best = resume_at(start.checkpoint, best_step)
        elif self.options.overwrite or start.is_restart:
            discard_run(self.path)
        elif (self.path / LOG_FILE).exists() or checkpoints(self.path):
            kept = set_aside(self.path, self.path.name)
            log.warning("the earlier run %s is kept as %s", self.path, kept)
        self.path.mkdir(parents=True, exist_ok=True)
        if not start.is_own and (self.path / LOG_FILE).is_symlink():
            (self.path / LOG_FILE).unlink()  # a new log does not empty what it leads to
        note_launch(self.path)
        return has_best

    def save(self, state: TrainState, data: Data, is_best: bool, must: bool) -> None:
        """Writes a checkpoint.

        One that cannot be written is a warning, and the best model is then the one before: there has to be a checkpoint
        of it. The last one of a run `must` be written.

        Raises:
            OSError: it cannot be written, and must be.
        """
        captured = state.capture()
        if self.world.on_main(lambda: self._write(state, data, captured, is_best, must)):
            self._saved_best = (state.best, state.best_step)
        else:
            state.best, state.best_step = self._saved_best

    def _write(self, state: TrainState, data: Data, captured: tuple, is_best: bool, must: bool) -> bool:
        model, tensors, plain = captured
        score = state.last if state.evaluated_step == state.step else None
        facts = {"classes": data.classes, "resize_size": data.resize_size, "options": state.options.to_dict()}
        facts |= {"mean": data.recipe.mean, "std": data.recipe.std}
        facts |= {"step": state.step, "data": data.record, **(score.summary() if score else {})}

        def save_model(folder: Path) -> None:
            state.evaluated.save_pretrained(folder, model)

        try:
            save_checkpoint(self.path, state.step, save_model, facts, tensors, plain, is_best)
        except SAVE_ERRORS as error:
            if must:
                raise OSError(f"train: the checkpoint of step {state.step} could not be written: {error}") from error
            log.warning(
                "the checkpoint of step %d could not be written, training continues; earlier ones are intact: %s",
                state.step,
                error,
            )
            self.log.write("unsaved", step=state.step, error=str(error))
            return False
        return True

    def best(self) -> Checkpoint | None:
        """The best checkpoint, on the CPU; None where it is not whole."""
        if self.world.on_main(lambda: is_whole(self.path / "best")):
            return load_checkpoint(self.path / "best")
        if self.world.is_main:
            log.warning("%s is not whole: the last model is reported as the best", self.path / "best")
        return None


def check_apart(options: TrainOptions, run: Path) -> None:
    """Whether a run's folder and the folders of its data and cache lie apart: an earlier run is renamed or deleted.

    Raises:
        ValueError: one is, or holds, the other.
    """
    own = Path(os.path.realpath(run))
    for name in ("data_root", "image_root", "cache_dir"):
        given = getattr(options, name)
        if not given or (name != "cache_dir" and canonical_name(options.dataset) == "partbirds"):
            continue
        other = Path(os.path.realpath(given))
        apart = own != other and own not in other.parents and other not in own.parents
        require(apart, "train", name, f"apart from the run's folder {printable(str(run))!r}", printable(given))
