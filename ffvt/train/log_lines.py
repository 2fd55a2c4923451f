"""What the lines of a run's log say: its facts, its steps, its evaluations, what went wrong, its end."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Sequence
from typing import Any

import torch

from ffvt.data.datasets import describe
from ffvt.errors import printable
from ffvt.model.cost import flops_per_image
from ffvt.train.data import Data
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import RunLog
from ffvt.train.state import TrainState
from ffvt.train.throughput import Throughput
from ffvt.version import __version__

log = logging.getLogger("ffvt")


def facts_of(options: TrainOptions, world: World, data: Data, peak_flops: float) -> dict[str, Any]:
    """What a run is: its first line. peak_flops: operations per second of large matrix products here."""
    return {
        "options": options.to_dict(),
        "world_size": world.size,
        "train_images": len(data.train),
        "eval_images": len(data.validation),
        "classes": len(data.classes),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "matmul_flops": peak_flops,
        "versions": {"ffvt": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class LogLines:
    """Writes the lines of one run; all ranks call every method, as sums go over all of them."""

    def __init__(self, to: RunLog, state: TrainState, data: Data, peak_flops: float) -> None:
        self.log, self.state, self.data = to, state, data
        config = state.model.config
        self.flops_per_image = math.nan if config.backbone else flops_per_image(config, training=True)
        self.peak_flops = peak_flops * state.world.size
        self.warned: set[str] = set()

    def training(self, rate: float, throughput: Throughput) -> None:
        """The means since the last such line, unless every step since then was skipped."""
        state = self.state
        if not state.world.any(bool(state.meter.sums[-1] > 0))[0]:
            return
        loss, accuracy, norm = state.meter.take(state.world)
        images_per_second = throughput.take()
        self.log.write(
            "train",
            step=state.step,
            epoch=state.samples / len(self.data.train),
            loss=loss,
            accuracy=accuracy,
            lr=rate,
            grad_norm=norm,
            images_per_second=images_per_second,
            mfu=images_per_second * self.flops_per_image / self.peak_flops,
            skipped=state.skipped,
        )
        self.log.show(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_per_second=f"{images_per_second:.0f}")

    def evaluation(self, step: int, split: str, score: Score, **which: str) -> None:
        """The score of the model of a step, and the images that were left out, each once."""
        for problem in score.problems:
            self._write_problem(problem, step)
        self.log.write("evaluate", step=step, split=split, **which, **score.summary())
        if not which:
            log.info("step %d: %s top-1 %.4f, loss %.4f", step, split, score.top1, score.loss)

    def unevaluated(self, error: Exception) -> None:
        """An evaluation that failed."""
        step, problem = self.state.step, printable(f"{type(error).__name__}: {error}", 300)
        self.log.write("unevaluated", step=step, error=problem)
        if self.state.world.is_main:
            log.warning("the evaluation of step %d failed, training continues: %s", step, problem)

    def unreadable(self, problems: Sequence[str]) -> None:
        """Images of this rank that were replaced, each once."""
        for problem in problems:
            if problem and self._write_problem(problem, self.state.step + 1):
                log.warning("an image cannot be read and is replaced by another: %s", problem)

    def _write_problem(self, problem: str, step: int) -> bool:
        """Logs an image that cannot be read; whether it is a new one."""
        is_new = problem not in self.warned
        if is_new:
            self.warned.add(problem)
            self.log.write("unreadable", step=step, problem=problem)
        return is_new

    def skipped(self, index: torch.Tensor) -> None:
        """A step that was skipped, with its images of all ranks.

        Raises:
            FloatingPointError: it is one too many in a row.
        """
        state, images = self.state, self.data.train.images
        own = [describe(images, int(i)) for i in index]
        names = [name for part in state.world.gather(own) for name in part]
        scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
        self.log.write("skip", step=state.step, images=names, loss_scale=scale)
        limit = state.options.max_skipped_steps
        if state.skipped_in_a_row > limit:
            raise FloatingPointError(
                f"train: loss and gradients must be finite; got inf or NaN in {limit + 1} steps in a row, the last at "
                f"step {state.step} with {', '.join(names)}"
            )

    def end(self, last: Score | None, best: Score | None, seconds: float, stopped: bool) -> None:
        """How the run ended, or was stopped."""
        state = self.state
        scores = {name: score.summary() if score else None for name, score in (("last", last), ("best", best))}
        self.log.write("stop" if stopped else "end", step=state.step, **scores, seconds=seconds)
