"""The training loop: `train(options)` reads from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ffvt.data.sampling import EvaluationView
from ffvt.precision import dtype_of
from ffvt.train.data import Data, open_data
from ffvt.train.distributed import join_world
from ffvt.train.evaluate import Score, evaluate
from ffvt.train.log_lines import LogLines, facts_of
from ffvt.train.options import TrainOptions
from ffvt.train.run_folder import RunFolder
from ffvt.train.signals import stop_on_sigterm
from ffvt.train.state import TrainState
from ffvt.train.step import Preparation, training_step
from ffvt.train.throughput import Throughput, measure_matmul_flops


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        last, best: scores of the last and the best model on the evaluated split; what was known where it was stopped.
        folder: the run's folder, which holds log.jsonl and the checkpoints last/ and best/.
        seconds: how long it took.
        chosen_on: what the best model was chosen on: the evaluated split itself, or "val".
        stopped: the step at which SIGTERM ended the run, or None.
    """

    last: Score | None
    best: Score | None
    folder: Path
    seconds: float
    chosen_on: str
    stopped: int | None = None

    def summary(self) -> str:
        """The result in one line, for a terminal."""
        end = f"{self.seconds:.0f} s; {self.folder}"
        if self.stopped is not None:
            return f"stopped at step {self.stopped}, --resume auto resumes; {end}"
        last, best = self.last, self.best
        return (
            f"last: top-1 {last.top1:.4f}, top-5 {last.top5:.4f}, loss {last.loss:.4f} on {last.count} images; "
            f"best (chosen on {self.chosen_on}): top-1 {best.top1:.4f}; {end}"
        )


def train(options: TrainOptions) -> TrainResult:
    """Trains as `options` say, in this process as one of the ranks that torchrun started, or alone.

    Writes <output_dir>/<name>/log.jsonl, and the models best/ and last/ beside it. SIGTERM ends it after the step at
    hand, with a checkpoint that `resume` resumes from.

    Raises:
        ValueError: an option, the data, the weights or the checkpoint do not fit.
        FloatingPointError: too many steps in a row had gradients that are not finite.
    """
    with (
        join_world(options.device, shard=options.fsdp) as world,
        stop_on_sigterm() as asked_to_stop,
        RunFolder(options, world) as run,
    ):
        started, stopped = time.perf_counter(), None
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        data = open_data(options, world)
        options = options.in_steps(len(data.train), world.size)
        weights = data.class_weights(options, world.device)
        state = TrainState(options, world, len(data.classes), is_resumed=run.is_resumed)
        peak_flops = measure_matmul_flops(world.device, dtype_of(options.autocast_precision))
        run.start(state, data, facts_of(options, world, data, peak_flops))
        lines = LogLines(run.log, state, data, peak_flops)
        lines.start()

        state.parallel.train()
        if state.step and _is_due(state) and state.evaluated_step != state.step:  # it was stopped before that
            run.save(state, data, is_best=_evaluate(state, data, lines), must=False)
        prepare, throughput = Preparation(data.recipe, data.mixing(options)), Throughput()
        batches = () if _has_converged(state) else data.batches(options, world, state.step, state.samples)
        for batch in batches:
            lines.unreadable(batch.problem)
            rate = state.scheduler.get_last_lr()[-1]
            step = training_step(state, batch, prepare, asked_to_stop.is_set(), weights)
            throughput.count(len(batch.label) * world.size)
            run.log.advance()
            if step.skipped:
                lines.skipped(batch.index)
            is_due = _is_due(state)
            if is_due or state.step % options.log_every == 0:
                lines.training(rate, throughput)
            is_best = is_due and not step.stop and _evaluate(state, data, lines)
            is_end = step.stop or state.step == options.num_steps or _has_converged(state)
            if is_best or is_end or state.step % options.save_every == 0:
                run.save(state, data, is_best, must=is_end)
            if is_due:
                throughput.restart()
            if step.stop:
                stopped = state.step
            if is_end:
                break

        last, best = (state.last, state.best) if stopped else _final_scores(state, data, run, lines)
        seconds = time.perf_counter() - started
        result = TrainResult(last, best, run.path, seconds, data.validation_split, stopped)
        lines.end(result.last, result.best, seconds, stopped is not None)
        return result


def _is_due(state: TrainState) -> bool:
    """Whether the step just made is one to evaluate after."""
    return state.step % state.options.eval_every == 0 or state.step == state.options.num_steps


def _has_converged(state: TrainState) -> bool:
    """Whether the evaluation of this step is the last one that `early_stopping` allows without a new best."""
    patience = state.options.early_stopping * state.options.eval_every  # steps
    return bool(patience) and state.evaluated_step == state.step >= state.best_step + patience


def _evaluate(state: TrainState, data: Data, lines: LogLines) -> bool:
    """Scores the model as it is; whether it is the best so far."""
    score = _score(state, state.evaluated, data.validation)
    state.last, state.evaluated_step = score, state.step
    is_best = state.best is None or score.top1 > state.best.top1
    if is_best:
        state.best, state.best_step = score, state.step
    lines.evaluation(state.step, data.validation_split, score)
    return is_best


def _score(state: TrainState, model: nn.Module, view: EvaluationView) -> Score:
    options = state.options
    return evaluate(model, view, state.world, options.eval_batch_size, options.autocast_precision, options.workers)


def _final_scores(state: TrainState, data: Data, run: RunFolder, lines: LogLines) -> tuple[Score, Score]:
    """The scores of the last and of the best model on the split that is reported."""
    if data.test is data.validation:
        return state.last, state.best or state.last
    last = best = _score(state, state.evaluated, data.test)
    if state.best_step not in (0, state.step):
        checkpoint = run.best()
        if checkpoint is not None:
            best = _score(state, checkpoint.model.to(state.world.device), data.test)
    split = state.options.eval_split
    lines.evaluation(state.step, split, last, model="last")
    lines.evaluation(state.best_step or state.step, split, best, model="best")
    return last, best
