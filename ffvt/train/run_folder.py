"""A run's folder: its lock, the checkpoint that it starts from, its log, and the checkpoints that it writes."""

from __future__ import annotations

import fcntl
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from ffvt.train.options import TrainOptions
from ffvt.train.resume import LAUNCH_FILE, Start, check_fit, find_start, launch_token
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
        self._open = ExitStack()  # the lock's file and the log
        self._saved_best: tuple = (None, 0)  # score and step of the best model that there is a checkpoint of

    def __enter__(self) -> RunFolder:
        self.world.on_main(self._acquire)
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def _acquire(self) -> None:
        path = self.path.with_name(f".{self.path.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not passed on to loading processes
        except OSError as error:
            lock.close()
            raise ValueError(f"train: {path} must be free; another process writes this run") from error
        self._open.callback(lock.close)

    def start(self, state: TrainState, data: Data, facts: dict[str, Any]) -> None:
        """Restores `state` from the checkpoint to resume from, if there is one, and opens the log, which gets `facts`.

        Raises:
            ValueError: the checkpoint is none, is damaged, or does not fit the options, the classes or the model.
        """
        options, on_main = state.options, self.world.on_main
        start = on_main(lambda: find_start(options, self.path))
        if start.checkpoint is not None:
            on_main(lambda: check_fit(start.checkpoint, options, data.classes))
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
        launch = launch_token()
        if launch is not None:
            (self.path / LAUNCH_FILE).write_text(launch)
        return has_best

    def save(self, state: TrainState, data: Data, is_best: bool, must: bool) -> None:
        """Writes a checkpoint.

        One that cannot be written is a warning, unless it `must` be written, as the last thing that the run does. The
        best model is then the one before: there has to be a checkpoint of it.

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
        facts |= {"step": state.step, **(score.summary() if score else {})}

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
