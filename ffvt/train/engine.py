"""The training loop: `train(options)` reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor, nn

from ffvt.data.sampling import EvaluationView, TrainingBatch
from ffvt.progress import Progress
from ffvt.rates import matmul_rates
from ffvt.train.agreement import check_data, check_options
from ffvt.train.auto_precision import settle_precision
from ffvt.train.data import Data, open_data
from ffvt.train.distributed import join_world
from ffvt.train.evaluate import Score, evaluate
from ffvt.train.log_lines import LogLines, facts_of
from ffvt.train.options import TrainOptions
from ffvt.train.run_folder import RunFolder
from ffvt.train.signals import Stopped, StopRequest, stop_on_signals
from ffvt.train.state import TrainState
from ffvt.train.step import Preparation, training_step
from ffvt.train.throughput import Throughput


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        last, best: scores of the last and the best model on the evaluated split; what was known where it was stopped.
        folder: the run's folder, which holds log.jsonl and the checkpoints last/ and best/.
        seconds: how long it took.
        chosen_on: what the best model was chosen on: the evaluated split itself, or "val".
        stopped: the step at which Ctrl-C or SIGTERM ended the run, or None.
        num_steps: the steps that it was to have.
        signal: what stopped it, SIGINT or SIGTERM, or None.
    """

    last: Score | None
    best: Score | None
    folder: Path
    seconds: float
    chosen_on: str
    stopped: int | None = None
    num_steps: int = 0
    signal: Signals | None = None

    def summary(self) -> str:
        """The result in one line, for a terminal."""
        end = f"{self.seconds:.0f} s; {self.folder}"
        if self.stopped is not None:
            return f"stopped at step {self.stopped} of {self.num_steps}; --resume auto resumes; {end}"
        last, best = self.last, self.best
        return (
            f"last: top-1 {last.top1:.4f}, top-5 {last.top5:.4f}, loss {last.loss:.4f} on {last.count} images; "
            f"best (chosen on {self.chosen_on}): top-1 {best.top1:.4f}; {end}"
        )


def train(options: TrainOptions) -> TrainResult:
    """Trains as `options` say, in this process as one of the ranks that torchrun started, or alone.

    Writes <output_dir>/<name>/log.jsonl, and the models best/ and last/ beside it. Ctrl-C and SIGTERM end it after the
    step at hand, or in an evaluation, with a checkpoint that `resume` resumes from; a second one ends it at once.

    Raises:
        ValueError: an option, the data, the weights or the checkpoint do not fit; the end could not be evaluated.
        FloatingPointError: too many steps in a row had gradients that are not finite.
    """
    with join_world(options.device, options.fsdp, options.rendezvous_timeout) as world:
        check_options(options, world)
        with RunFolder(options, world) as run:
            started = time.perf_counter()
            torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
            rates = world.on_main(lambda: matmul_rates(world.device))
            options = settle_precision(options, run.checkpoint, rates, world)
            data = world.on_all(lambda: open_data(options))
            check_data(data, world)
            world.on_main(lambda: data.check_images(options.skip_bad_images))
            in_steps = options.in_steps(len(data.train), world.size)
            state = TrainState(in_steps, world, len(data.classes), is_resumed=run.checkpoint is not None)
            run.start(state, data, facts_of(in_steps, world, data, rates))
            lines = LogLines(run.log, state, data, rates)
            lines.start()

            stopped = signal = None
            with stop_on_signals() as asked:
                try:
                    _take_steps(state, data, run, lines, asked)
                    last, best = _final_scores(state, data, run, lines, asked)
                except Stopped:
                    stopped, signal = state.step, asked.agreed(world)
                    last, best = state.last, state.best
            seconds = time.perf_counter() - started
            lines.end(last, best, seconds, stopped is not None)
            return TrainResult(
                last, best, run.path, seconds, data.validation_split, stopped, in_steps.num_steps, signal
            )


def _take_steps(state: TrainState, data: Data, run: RunFolder, lines: LogLines, asked: StopRequest) -> None:
    """Trains to the last step, with the evaluations and the checkpoints that are due.

    Raises:
        Stopped: it was `asked` to, and has saved.
    """
    options, world = state.options, state.world
    weights = data.class_weights(options, world.device)
    state.parallel.train()
    try:
        if state.step and _is_due(state) and state.evaluated_step != state.step:  # it was stopped before that
            run.save(state, data, is_best=_evaluate(state, data, lines, asked), must=_is_end(state))
        prepare, throughput = Preparation(data.recipe, data.mixing(options)), Throughput()
        with closing(_batches(state, data, run)) as batches:
            for batch in batches:
                lines.unreadable(batch.problem)
                rate = state.scheduler.get_last_lr()[-1]
                step = training_step(state, batch, prepare, bool(asked), weights)
                throughput.count(len(batch.label) * world.size)
                run.log.advance()
                if step.skipped:
                    lines.skipped(batch.index)
                is_due = _is_due(state)
                if is_due or state.step % options.log_every == 0:
                    lines.training(rate, throughput)
                if step.stop:
                    raise Stopped
                is_best = is_due and _evaluate(state, data, lines, asked)
                is_end = _is_end(state)
                if is_best or is_end or state.step % options.save_every == 0:
                    run.save(state, data, is_best, must=is_end)
                if is_end:
                    break
                if is_due:
                    throughput.restart()
    except Stopped:
        run.save(state, data, is_best=False, must=True)
        raise


def _batches(state: TrainState, data: Data, run: RunFolder) -> Iterator[TrainingBatch]:
    """This rank's batches to the last step; where one cannot be loaded on some rank, the run is saved and ends."""
    if _is_end(state):
        return
    with data.batches(state.options, state.world, state.step, state.samples) as batches:
        while True:
            try:
                batch = state.world.on_all(lambda: next(batches))
            except Exception:
                if state.step:
                    run.save(state, data, is_best=False, must=False)
                raise
            yield batch


def _is_due(state: TrainState) -> bool:
    """Whether the step just made is one to evaluate after."""
    return state.step % state.options.eval_every == 0 or state.step == state.options.num_steps


def _is_end(state: TrainState) -> bool:
    """Whether the step just made is the last: by number, or as `early_stopping` allows no more without a new best."""
    patience = state.options.early_stopping * state.options.eval_every  # steps
    waited = state.step - state.best_step if state.best is not None and state.evaluated_step == state.step else 0
    return state.step == state.options.num_steps or 0 < patience <= waited


def _evaluate(state: TrainState, data: Data, lines: LogLines, asked: StopRequest) -> bool:
    """Scores the model as it is; whether it is the best so far. An error costs the evaluation, not the run."""
    try:
        score = _score(state, state.evaluated, data.validation, asked)
    except Stopped:
        raise
    except Exception as error:  # whatever it is, what was learned is worth more
        lines.unevaluated(error)
        return False
    state.last, state.evaluated_step = score, state.step
    is_best = state.best is None or score.top1 > state.best.top1
    if is_best:
        state.best, state.best_step = score, state.step
    lines.evaluation(state.step, data.validation_split, score)
    return is_best


def _score(state: TrainState, model: nn.Module, view: EvaluationView, asked: StopRequest) -> Score:
    options, world = state.options, state.world
    how = (options.eval_batch_size, options.autocast_precision, options.workers, asked.__bool__)
    with Progress(len(view), "evaluate", enabled=world.is_main) as progress:

        def each(labels: Tensor, _logits: Tensor) -> None:
            progress.advance(min(len(labels) * world.size, len(view) - progress.done))

        return evaluate(model, view, world, *how, each)


def _final_scores(
    state: TrainState, data: Data, run: RunFolder, lines: LogLines, asked: StopRequest
) -> tuple[Score, Score]:
    """The scores of the last and of the best model on the split that is reported.

    Raises:
        ValueError: the last model was not evaluated.
        Stopped: it was `asked` to; the run was saved before.
    """
    if state.evaluated_step != state.step:
        error = ValueError(
            f"train: the end must be evaluated; got an error, which the log names. The model of step {state.step} is "
            f"saved in {run.path / 'last'}, --resume auto evaluates it"
        )
        error.of_rank = 0  # all ranks raise it
        raise error
    if data.test is data.validation:
        return state.last, state.best or state.last
    last = best = _score(state, state.evaluated, data.test, asked)
    if state.best_step not in (0, state.step):
        checkpoint = run.best()
        if checkpoint is not None:
            best = _score(state, checkpoint.model.to(state.world.device), data.test, asked)
    split = state.options.eval_split
    lines.evaluation(state.step, split, last, model="last")
    lines.evaluation(state.best_step or state.step, split, best, model="best")
    return last, best
