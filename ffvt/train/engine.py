"""The training loop: `train(options)` reads from top to bottom."""

from __future__ import annotations

import logging
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ffvt.data.datasets import describe
from ffvt.data.sampling import EvaluationView, StepSampler, TrainingBatch, batch_as_it_is
from ffvt.model.cost import flops_per_image
from ffvt.model.ffvt import FFVT
from ffvt.precision import DTYPES
from ffvt.train.checkpoint import SAVE_ERRORS, is_whole, load_checkpoint, load_state, save_checkpoint
from ffvt.train.distributed import World, join_world
from ffvt.train.evaluate import Score, evaluate, ignore_sigterm
from ffvt.train.options import TrainOptions
from ffvt.train.resume import RunLock, Start, check_fit, find_start, prepare
from ffvt.train.runlog import RunLog
from ffvt.train.state import TrainState
from ffvt.train.step import training_step
from ffvt.train.throughput import measure_matmul_flops
from ffvt.train.views import open_views
from ffvt.version import __version__

log = logging.getLogger("ffvt")


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: the last and the best model's scores on the evaluated split, its folder, its seconds.

    The folder holds log.jsonl and the checkpoints last/ and best/. best was chosen on `chosen_on`: the evaluated split
    itself, or "val". stopped: the step at which SIGTERM ended the run (then last and best are what was known, or None).
    """

    last: Score | None
    best: Score | None
    folder: Path
    seconds: float
    chosen_on: str
    stopped: int | None = None


def train(options: TrainOptions) -> TrainResult:
    """Trains as `options` say, in this process as one of the ranks that torchrun started, or alone.

    Writes <output_dir>/<name>/log.jsonl, and the models best/ and last/ beside it. SIGTERM ends it after the step at
    hand, with a checkpoint that `resume` goes on from.

    Raises:
        ValueError: an option, the data, the weights or the checkpoint do not fit. FloatingPointError: too many steps in
        a row had gradients that are not finite.
    """
    folder = Path(options.output_dir) / options.name
    lock = RunLock(folder)
    with join_world(options.device) as world, _stop_on_sigterm() as asked_to_stop:
        if options.fsdp and not torch.distributed.is_initialized():
            raise ValueError("train: fsdp needs torchrun, with one process or more; got fsdp=True without it")
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        world.on_main(lock.acquire)
        try:
            return _Run(options, world, folder, asked_to_stop).train()
        finally:
            lock.release()


class _Run:
    """One run on this rank."""

    def __init__(self, options: TrainOptions, world: World, folder: Path, asked_to_stop: threading.Event) -> None:
        self.started = time.perf_counter()
        self.options, self.world, self.folder, self.asked_to_stop = options, world, folder, asked_to_stop
        self.views = open_views(options)
        self.peak_flops = measure_matmul_flops(world.device, DTYPES[options.autocast_precision])
        self.state = TrainState(options, world, len(self.views.training.images.classes))
        config = self.state.model.config
        self.flops_per_image = math.nan if config.backbone else flops_per_image(config, training=True)
        for view in (self.views.choosing, self.views.final):
            view.grid_size = self.state.model.config.grid_size
        start = self._start()
        self.log = RunLog(
            self.folder,
            options.name,
            options.num_steps,
            self.state.step,
            goes_on=start.goes_on,
            enabled=world.is_main,
            tensorboard=options.tensorboard,
        )
        self.log.write("run", **self._facts())
        if start.checkpoint is not None:
            self.log.write("resume", step=self.state.step, checkpoint=str(start.checkpoint))
            if world.is_main:
                log.warning("resumed from %s, step %d of %d", start.checkpoint, self.state.step, options.num_steps)
        self.kept_best = (self.state.best, self.state.best_step)  # of which there is a checkpoint
        self.warned: set[str] = set()
        self.since, self.images_since = time.perf_counter(), 0

    def _start(self) -> Start:
        """Takes on the state of the checkpoint to go on from, if there is one, and makes the folder ready."""
        options, state, world = self.options, self.state, self.world
        start = world.on_main(lambda: find_start(options, self.folder))
        if start.checkpoint is not None:
            classes = self.views.training.images.classes
            world.on_main(lambda: check_fit(start.checkpoint, options, classes))
            state.restore(*load_state(start.checkpoint))
        if not world.on_main(lambda: prepare(options, self.folder, start, state.best_step)):
            state.best, state.best_step = None, 0
        return start

    def train(self) -> TrainResult:
        state = self.state
        try:
            stopped = self._loop()
            if stopped and self.world.is_main:
                log.warning("stopped at step %d of %d; --resume auto goes on", state.step, self.options.num_steps)
            last, best = (state.last, state.best) if stopped else self._final_scores()
            seconds = time.perf_counter() - self.started
            result = TrainResult(
                last, best, self.folder, seconds, self.views.chosen_on, state.step if stopped else None
            )
            self._log_end(result)
            return result
        finally:
            self.log.close()

    def _loop(self) -> bool:
        """Trains up to the last step; True where it was asked to stop before."""
        options, state = self.options, self.state
        state.parallel.train()
        if state.step and self._is_due() and state.evaluated_step != state.step:  # it was stopped before that
            self._save(is_best=self._evaluate(), must=False)
        self.since, self.images_since = time.perf_counter(), 0
        for batch in self._batches():
            self._report_unreadable(batch.problem)
            rate = state.scheduler.get_last_lr()[-1]
            result = training_step(
                state, batch.image, batch.label, batch.jitter, self.views.training.recipe, self.asked_to_stop.is_set()
            )
            self.images_since += len(batch.label) * self.world.size
            self.log.advance()
            if result.skipped:
                self._report_skipped(batch.index)
            is_evaluated = self._is_due() and not result.stop
            if state.step % options.log_every == 0 or self._is_due():
                self._log_training(rate)
            is_best = self._evaluate() if is_evaluated else False
            is_end = state.step == options.num_steps
            if is_best or is_end or result.stop or state.step % options.save_every == 0:
                self._save(is_best, must=result.stop)
            if result.stop:
                return True
            if is_evaluated:
                self.since, self.images_since = time.perf_counter(), 0
        return False

    def _is_due(self) -> bool:
        """Whether the step just made is one to evaluate after."""
        step = self.state.step
        return step % self.options.eval_every == 0 or step == self.options.num_steps

    def _batches(self) -> Iterator[TrainingBatch]:
        options, state, world = self.options, self.state, self.world
        sampler = StepSampler(
            len(self.views.training),
            options.train_batch_size,
            options.num_steps - state.step,
            options.seed,
            world.rank,
            world.size,
            state.samples,
        )
        own = torch.Generator()  # the loader must not draw from the generator that makes the dropout masks
        return iter(
            DataLoader(
                self.views.training,
                batch_sampler=sampler,
                num_workers=options.workers,
                pin_memory=world.device.type == "cuda",
                prefetch_factor=options.prefetch if options.workers else None,
                collate_fn=batch_as_it_is,
                worker_init_fn=ignore_sigterm,
                generator=own,
            )
        )

    def _evaluate(self) -> bool:
        """Scores the model as it is; whether it is the best so far."""
        state = self.state
        score = self._score(state.evaluated, self.views.choosing)
        state.last, state.evaluated_step = score, state.step
        is_best = state.best is None or score.top1 > state.best.top1
        if is_best:
            state.best, state.best_step = score, state.step
        self.log.write("evaluate", step=state.step, split=self.views.chosen_on, **score.summary())
        log.info("step %d: %s top-1 %.4f, loss %.4f", state.step, self.views.chosen_on, score.top1, score.loss)
        return is_best

    def _score(self, model: FFVT, view: EvaluationView) -> Score:
        options = self.options
        return evaluate(model, view, self.world, options.eval_batch_size, options.autocast_precision, options.workers)

    def _save(self, is_best: bool, must: bool) -> None:
        """Writes a checkpoint.

        One that cannot be written is a warning, unless this must be the last thing that the run does. What is best is
        then what was best before: there has to be a checkpoint of it.
        """
        captured = self.state.capture()
        saved = self.world.on_main(lambda: self._write(captured, is_best, must))
        if saved:
            self.kept_best = (self.state.best, self.state.best_step)
        else:
            self.state.best, self.state.best_step = self.kept_best

    def _write(self, captured: tuple[dict, dict, dict], is_best: bool, must: bool) -> bool:
        state, images = self.state, self.views.training.images
        model, tensors, plain = captured
        score = state.last if state.evaluated_step == state.step else None
        facts = {"classes": list(images.classes), "resize_size": images.side, "options": self.options.to_dict()}
        facts |= {"step": state.step, **(score.summary() if score else {})}
        try:
            save_checkpoint(
                self.folder,
                state.step,
                lambda folder: state.evaluated.save_pretrained(folder, model),
                facts,
                tensors,
                plain,
                is_best,
            )
        except SAVE_ERRORS as error:
            if must:
                raise OSError(f"train: the checkpoint of step {state.step} could not be written: {error}") from error
            log.warning(
                "the checkpoint of step %d could not be written, training goes on; earlier ones are whole: %s",
                state.step,
                error,
            )
            self.log.write("unsaved", step=state.step, error=str(error))
            return False
        return True

    def _final_scores(self) -> tuple[Score, Score]:
        """The scores of the last and of the best model on the split that is reported."""
        state, views = self.state, self.views
        if views.final is views.choosing:
            return state.last, state.best or state.last
        last = best = self._score(state.evaluated, views.final)
        if state.best_step not in (0, state.step):
            if self.world.on_main(lambda: is_whole(self.folder / "best")):
                model = load_checkpoint(self.folder / "best").model
                best = self._score(model.to(self.world.device), views.final)
            elif self.world.is_main:
                log.warning("%s is not whole: the last model is reported as the best", self.folder / "best")
        for which, step, score in (("last", state.step, last), ("best", state.best_step or state.step, best)):
            self.log.write("evaluate", step=step, split=self.options.eval_split, model=which, **score.summary())
        return last, best

    def _log_training(self, rate: float) -> None:
        state = self.state
        if not self.world.any(bool(self.state.meter.sums[-1] > 0))[0]:
            return  # every step since the last line was skipped
        loss, accuracy, norm = state.meter.take(self.world)
        images_per_second = self.images_since / (time.perf_counter() - self.since)
        self.log.write(
            "train",
            step=state.step,
            epoch=state.samples / len(self.views.training),
            loss=loss,
            accuracy=accuracy,
            lr=rate,
            grad_norm=norm,
            images_per_second=images_per_second,
            mfu=images_per_second * self.flops_per_image / (self.peak_flops * self.world.size),
            skipped=state.skipped,
        )
        self.log.show(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_per_second=f"{images_per_second:.0f}")
        self.since, self.images_since = time.perf_counter(), 0

    def _report_unreadable(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem and problem not in self.warned:
                self.warned.add(problem)
                log.warning("a picture cannot be read and is replaced by another: %s", problem)
                self.log.write("unreadable", step=self.state.step + 1, problem=problem)

    def _report_skipped(self, index: torch.Tensor) -> None:
        """Logs a step that was skipped; too many in a row end the run."""
        state, images = self.state, self.views.training.images
        own = [describe(images, int(i)) for i in index]
        names = [name for part in self.world.gather(own) for name in part]
        scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
        self.log.write("skip", step=state.step, images=names, loss_scale=scale)
        limit = self.options.max_skipped_steps
        if state.skipped_in_a_row > limit:
            raise FloatingPointError(
                f"train: loss and gradients must be finite; got inf or NaN in {limit + 1} steps in a row, the last at "
                f"step {state.step} with {', '.join(names)}"
            )

    def _log_end(self, result: TrainResult) -> None:
        values = {
            name: score.summary() if score else None for name, score in (("last", result.last), ("best", result.best))
        }
        self.log.write("stop" if result.stopped else "end", step=self.state.step, **values, seconds=result.seconds)

    def _facts(self) -> dict[str, Any]:
        world, views = self.world, self.views
        return {
            "options": self.options.to_dict(),
            "world_size": world.size,
            "train_images": len(views.training),
            "eval_images": len(views.choosing),
            "classes": len(views.training.images.classes),
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
            "matmul_flops": self.peak_flops,
            "versions": {"ffvt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process at once; in the main thread only."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, earlier)
