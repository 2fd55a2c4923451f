"""The training loop: `train(options)` reads from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import platform
import random
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ffvt.data.datasets import EvaluationView, StepSampler, TrainingView, open_split
from ffvt.data.transforms import normalize
from ffvt.model.ffvt import FFVT, create_model
from ffvt.model.weights import load_weights
from ffvt.train.checkpoint import save_checkpoint
from ffvt.train.distributed import World, join_world
from ffvt.train.evaluate import Score, autocast, evaluate
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions
from ffvt.version import __version__

log = logging.getLogger("ffvt")

DEFAULT_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: the last and the best evaluation, its folder (log.jsonl, best/, last/), its seconds."""

    last: Score
    best: Score
    folder: Path
    seconds: float


class RunLog:
    """One JSON object per line, on the main rank only. A number that is not finite is written as null."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self.file = None
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w")

    def write(self, kind: str, **values: Any) -> None:
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            print(json.dumps({"kind": kind, **finite}, allow_nan=False), file=self.file, flush=True)


def train(options: TrainOptions) -> TrainResult:
    """Trains as `options` say, in this process as one of the ranks that torchrun started, or alone.

    Writes <output_dir>/<name>/log.jsonl, and the models best/ and last/ beside it.

    Raises:
        ValueError: an option, the data or the weights do not fit. FloatingPointError: the loss is no longer finite.
    """
    with join_world(options.device) as world:
        return _train(options, world)


def _train(options: TrainOptions, world: World) -> TrainResult:
    started = time.perf_counter()
    folder = Path(options.output_dir) / options.name
    seed_everything(options.seed)
    training, evaluation = (_open(options, split) for split in ("train", options.eval_split))
    model = build_model(options, len(training.classes)).to(world.device)
    seed_everything(options.seed + world.rank)  # the weights are the same on every rank, the dropout masks are not
    parallel = world.wrap(model)
    optimizer = make_optimizer(options.optimizer, model.parameters(), options.learning_rate, options.weight_decay)
    scheduler = make_scheduler(optimizer, options.decay_type, options.warmup_steps, options.num_steps)
    scaler = make_scaler(options, world)
    loader = _training_loader(options, training, world)
    if world.is_main:  # of an earlier run of this name
        for kind in ("best", "last"):
            shutil.rmtree(folder / kind, ignore_errors=True)
    run_log = RunLog(folder / "log.jsonl", world.is_main)
    run_log.write("run", options=options.to_dict(), world_size=world.size, **_facts(training, evaluation, world))

    def evaluate_and_save(step: int, best: Score | None) -> tuple[Score, Score]:
        view = EvaluationView(evaluation, options.img_size)
        score = evaluate(model, view, world, options.eval_batch_size, options.autocast_precision, options.workers)
        is_best = best is None or score.top1 > best.top1
        run_log.write("evaluate", step=step, split=options.eval_split, **asdict(score))
        if world.is_main:
            side = training[0][0].shape[-1]
            facts = {"classes": list(training.classes), "resize_size": side, "options": options.to_dict(), "step": step}
            facts |= asdict(score)
            for kind in ("last", "best") if is_best else ("last",):
                save_checkpoint(folder / kind, model, facts)
        return score, score if best is None or is_best else best

    last = best = None
    losses, since = [], time.perf_counter()
    progress = tqdm(total=options.num_steps, desc=options.name, disable=not (world.is_main and sys.stderr.isatty()))
    parallel.train()
    for step, (images, labels) in enumerate(loader, start=1):
        rate = scheduler.get_last_lr()[0]
        loss, norm = training_step(parallel, optimizer, scheduler, scaler, images, labels, options, world)
        losses.append(loss)
        progress.update()
        is_evaluated = step % options.eval_every == 0 or step == options.num_steps
        if step % options.log_every == 0 or is_evaluated:
            mean = world.sum(torch.stack(losses).mean()).item() / world.size
            if not np.isfinite(mean):
                raise FloatingPointError(f"train: the loss must be finite; got loss={mean} at step {step}")
            images_per_second = len(losses) * len(labels) * world.size / (time.perf_counter() - since)
            run_log.write(
                "train", step=step, loss=mean, lr=rate, grad_norm=norm.item(), images_per_second=images_per_second
            )
            progress.set_postfix(loss=f"{mean:.3f}", lr=f"{rate:.2e}", images_per_second=f"{images_per_second:.0f}")
            losses, since = [], time.perf_counter()
        if is_evaluated:
            last, best = evaluate_and_save(step, best)
            since = time.perf_counter()
    progress.close()
    result = TrainResult(last, best, folder, time.perf_counter() - started)
    run_log.write("end", last=asdict(last), best=asdict(best), seconds=result.seconds)
    return result


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    options: TrainOptions,
    world: World,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on this rank's batch, in `gradient_accumulation_steps` parts.

    images (B, 3, S, S) uint8, labels (B,) int64. Returns this rank's mean loss and the gradient norm before clipping,
    both scalars on the device. A step that the scaler skips (fp16 gradients overflowed) does not advance the schedule.
    """
    parts = options.gradient_accumulation_steps
    total = torch.zeros((), device=world.device)
    for part, (some, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts))):
        is_last = part == parts - 1
        with nullcontext() if is_last or world.size == 1 else model.no_sync():
            with autocast(world.device, options.autocast_precision):
                logits = model(normalize(some.to(world.device, non_blocking=True)))
            targets = targets.to(world.device, non_blocking=True)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=options.smoothing_value) / parts
            scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm or float("inf"))
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if scaler.get_scale() >= scale:  # a smaller scale means that the step was skipped
        scheduler.step()
    return total, norm


def build_model(options: TrainOptions, num_classes: int) -> FFVT:
    """The model that `options` describe, with its starting weights."""
    model = create_model(
        options.model_type,
        image_size=options.img_size,
        num_classes=num_classes,
        num_select=options.num_token,
        feature_fusion=options.feature_fusion,
        **options.model_overrides,
    )
    if options.pretrained_dir:
        log.info("%s", load_weights(model, options.pretrained_dir, last_block=options.last_block))
    return model


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_scaler(options: TrainOptions, world: World) -> torch.amp.GradScaler:
    """The gradient scaler of fp16; for the other precisions one that does nothing."""
    first = options.loss_scale or DEFAULT_LOSS_SCALE
    return torch.amp.GradScaler(world.device.type, init_scale=first, enabled=options.autocast_precision == "fp16")


def _open(options: TrainOptions, split: str) -> Any:
    return open_split(
        options.dataset, split, options.img_size, options.resize_size, options.data_root, options.preset, options.seed
    )


def _training_loader(options: TrainOptions, images: Any, world: World) -> DataLoader:
    sampler = StepSampler(
        len(images), options.train_batch_size, options.num_steps, options.seed, world.rank, world.size
    )
    return DataLoader(
        TrainingView(images, options.img_size, options.seed),
        batch_sampler=sampler,
        num_workers=options.workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=options.workers > 0,
    )


def _facts(training: Any, evaluation: Any, world: World) -> dict[str, Any]:
    return {
        "train_images": len(training),
        "eval_images": len(evaluation),
        "classes": len(training.classes),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"ffvt": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
