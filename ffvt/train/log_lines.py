"""What the lines of a run's log say: its facts, its steps, its evaluations, what went wrong, its end."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ffvt.data.datasets import describe
from ffvt.errors import printable
from ffvt.model.registry import training_flops
from ffvt.train.announcement import advice, announcement, precision_advice
from ffvt.train.data import Data
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import RunLog
from ffvt.train.state import TrainState
from ffvt.train.throughput import Throughput
from ffvt.version import __version__

log = logging.getLogger("ffvt")

NAMED = 3  # images that a message names


def facts_of(options: TrainOptions, world: World, data: Data, rates: Mapping[str, float]) -> dict[str, Any]:
    """What a run is: its first line. rates: FLOP/s of matrix products here, by precision."""
    return {
        "options": options.to_dict(),
        "world_size": world.size,
        "train_images": len(data.train),
        "eval_images": len(data.validation),
        "classes": len(data.classes),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "matmul_flops": rates[options.autocast_precision],
        "matmul_rates": dict(rates),
        "versions": {"ffvt": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class LogLines:
    """Writes the lines of one run; all ranks call every method, as sums go over all of them."""

    def __init__(self, to: RunLog, state: TrainState, data: Data, rates: Mapping[str, float]) -> None:
        self.log, self.state, self.data, self.rates = to, state, data, rates
        self.flops_per_image = training_flops(state.model)
        self.peak_flops = rates[state.options.autocast_precision] * state.world.size
        self.warned: set[str] = set()  # of this rank
        self.written: set[str] = set()
        self.unwritten: list[tuple[str, int]] = []  # of this rank: an image, the step

    def start(self) -> None:
        """What the run is, for people."""
        state, options = self.state, self.state.options
        if not state.world.is_main:
            return
        for line in announcement(state, self.data, self.rates).splitlines():
            log.info("%s", line)
        faster = precision_advice(options, self.rates, state.world.device.type, is_resumed=state.step > 0)
        for line in [*advice(options, len(self.data.train)), *faster]:
            log.warning("note: %s", line)

    def training(self, rate: float, throughput: Throughput) -> None:
        """The means since the last such line, unless every step since then was skipped."""
        self._write_replaced()
        state = self.state
        if not state.world.any(state.meter.steps > 0)[0]:
            return
        loss, accuracy, norm, contrastive = state.meter.take(state.world)
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
            **({"contrastive": contrastive} if state.options.contrastive else {}),  # a part of the loss
        )
        if self.log.has_bar:
            self.log.show(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_per_second=f"{images_per_second:.0f}")
        elif state.world.is_main:
            self._say(loss, rate, images_per_second)

    def _say(self, loss: float, rate: float, images_per_second: float) -> None:
        """The same in a line, where no terminal has a bar."""
        state, options = self.state, self.state.options
        left = (options.num_steps - state.step) * options.train_batch_size * state.world.size / images_per_second
        log.info(
            "step %d of %d, epoch %.2f: loss %.4f, learning rate %.2e, %.3g images/s, %s left",
            *(state.step, options.num_steps, state.samples / len(self.data.train)),
            *(loss, rate, images_per_second, duration(left)),
        )

    def evaluation(self, step: int, split: str, score: Score, **which: str) -> None:
        """The score of the model of a step, and the images that were left out, each once."""
        self._write_problems([(problem, step) for problem in score.problems])
        self.log.write("evaluate", step=step, split=split, **which, **score.summary())
        if not which:
            log.info("step %d: %s top-1 %.4f, loss %.4f", step, split, score.top1, score.loss)

    def unevaluated(self, error: Exception) -> None:
        """An evaluation that failed."""
        step, problem = self.state.step, printable(f"{type(error).__name__}: {error}", 300)
        self.log.write("unevaluated", step=step, error=problem)
        if self.state.world.is_main:
            outlook = ", training continues" if step < self.state.options.num_steps else ""
            log.warning("the evaluation of step %d failed%s: %s", step, outlook, problem)

    def unreadable(self, problems: Sequence[str]) -> None:
        """Images of this rank that were replaced, each once; the log gets those of all ranks with its next line."""
        for problem in problems:
            if problem and problem not in self.warned:
                self.warned.add(problem)
                self.unwritten.append((problem, self.state.step + 1))
                log.warning("an image cannot be read and is replaced by another: %s", problem)

    def _write_problems(self, problems: Sequence[tuple[str, int]]) -> None:
        """Logs images that cannot be read, each once, with the steps at which they were met."""
        for problem, step in problems:
            if problem not in self.written:
                self.written.add(problem)
                self.log.write("unreadable", step=step, problem=problem)

    def _write_replaced(self) -> None:
        """Logs what all ranks replaced since the last time."""
        found, self.unwritten = self.state.world.gather(self.unwritten), []
        self._write_problems([problem for part in found for problem in part])

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
            error = FloatingPointError(
                f"train: loss and gradients must be finite; got inf or NaN in {limit + 1} steps in a row, the last at "
                f"step {state.step} with {', '.join(names[:NAMED])}{' and others' * (len(names) > NAMED)}. What helps "
                f"most often: a lower learning_rate (it is {state.options.learning_rate:g}), max_grad_norm=1 (it is "
                f"{state.options.max_grad_norm:g}), bf16 or fp32 instead of fp16"
            )
            error.of_rank = 0  # all ranks raise it
            raise error

    def end(self, last: Score | None, best: Score | None, seconds: float, stopped: bool) -> None:
        """How the run ended, or was stopped."""
        self._write_replaced()
        state = self.state
        scores = {name: score.summary() if score else None for name, score in (("last", last), ("best", best))}
        self.log.write("stop" if stopped else "end", step=state.step, **scores, seconds=seconds)
        if state.step < state.options.num_steps and not stopped and state.world.is_main:
            best = state.best_step
            log.info("ended at step %d of %d: no new best since step %d", state.step, state.options.num_steps, best)


def duration(seconds: float) -> str:
    """A time for people: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
