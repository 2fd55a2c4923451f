"""One optimiser step: accumulate, unscale, clip, and skip where a gradient or the loss is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ffvt.data.mixing import Mixing
from ffvt.data.sampling import TrainingBatch, mix
from ffvt.data.transforms import Recipe, augment, erase
from ffvt.precision import autocast
from ffvt.train.contrastive import contrastive_loss_of_all
from ffvt.train.distributed import gradients_stay_local
from ffvt.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """loss and norm (of the gradient, before clipping) of a step, scalars on the device; whether it was skipped, and
    whether any rank was asked to stop."""

    loss: Tensor
    norm: Tensor
    skipped: bool
    stop: bool


class Preparation:
    """What a batch goes through on its way into the model: `augment` by a recipe, `erase`, and perhaps mixing.

    The images go into memory that is written over: fresh memory costs more than the arithmetic.
    """

    def __init__(self, recipe: Recipe, mixing: Mixing | None = None) -> None:
        self.recipe, self.mixing = recipe, mixing
        self.pixels: Tensor | None = None

    def __call__(self, images: Tensor, jitter: Tensor | None = None, erased: Tensor | None = None) -> Tensor:
        """Images (B, 3, S, S) uint8 as the model's input, fp32, before mixing; valid until the next call."""
        self.pixels = augment(images, jitter, self.recipe, out=self.pixels)
        if self.recipe.erasing and erased is not None:
            erase(self.pixels, erased)
        return self.pixels

    def mix(self, pixels: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The input and its targets: the labels (B,), or where there is mixing the shares of the classes (B, C)."""
        return self.mixing(pixels, labels, seed) if self.mixing else (pixels, labels)


def training_step(
    state: TrainState,
    batch: TrainingBatch,
    prepare: Preparation,
    stop: bool = False,
    class_weights: Tensor | None = None,
) -> StepResult:
    """One step on this rank's batch, in `gradient_accumulation_steps` parts.

    The contrastive loss is over the pairs of a part's images, of all ranks.

    A step with an inf or a NaN in the loss or the gradients of any rank changes no weight and does not advance the
    schedule; in fp16 it halves the loss scale.

    Args:
        state: what the step changes.
        batch: of the training view.
        prepare: takes it to the model's input.
        stop: this process was asked to stop, which all ranks have to know at the same step.
        class_weights: (C,) fp32 on the device, of the classes in the loss; None for equal ones.
    """
    options, world = state.options, state.world
    parts, count = options.gradient_accumulation_steps, len(batch.label)
    loss = torch.zeros((), device=world.device)
    correct, contrast = torch.zeros_like(loss), torch.zeros_like(loss)
    place = state.samples + world.rank * count  # of the part's first image in the training stream
    for part, (images, labels, *draws) in enumerate(_split(batch, parts, world.device), start=1):
        with nullcontext() if part == parts else gradients_stay_local(state.parallel):
            # Seeded by place, so that what is mixed depends neither on the number of ranks nor on a resume.
            pixels, targets = prepare.mix(prepare(images, *draws), labels, mix(options.seed, place, -4))
            with autocast(world.device, options.autocast_precision):
                logits, features = _outputs(state, pixels)
            part_loss = batch_loss(logits, targets, options.smoothing_value, class_weights) / parts
            if features is not None:
                part_contrast = contrastive_loss_of_all(features, targets, world) / parts
                part_loss = part_loss + part_contrast
                contrast += part_contrast.detach()
            state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
        correct += count_correct(logits.detach(), targets)
        place += len(labels)
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), options.max_grad_norm or float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    skip, stop = world.any(not bool(torch.isfinite(norm) & torch.isfinite(loss)), stop)  # the host waits here
    if not skip:
        state.scaler.step(state.optimizer)
        state.scheduler.step()
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.meter.add(loss, correct, count, norm, contrast)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.samples += count * world.size
    state.skipped += skip
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skip else 0
    return StepResult(loss, norm, skip, stop)


def _outputs(state: TrainState, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (B, num_classes), and with the contrastive loss what the head saw, (B, C)."""
    return state.parallel(pixels, need_features=True) if state.options.contrastive else (state.parallel(pixels), None)


def _split(batch: TrainingBatch, parts: int, device: torch.device) -> Iterator[tuple[Tensor | None, ...]]:
    """Images and labels on the device, jitter and erased rectangles where they are, of each part of a batch."""
    images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.image, batch.label))
    draws = (repeat(None) if drawn is None else drawn.chunk(parts) for drawn in (batch.jitter, batch.erased))
    return zip(images.chunk(parts), labels.chunk(parts), *draws)


def batch_loss(logits: Tensor, targets: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Mean over the images of the cross-entropy in fp32, a scalar.

    Smoothing takes its share of every target and deals it out evenly; then each class's part counts by its weight. The
    mean is over images, not over weights, so that parts of a batch add up to the batch.

    Args:
        logits: (B, C).
        targets: labels (B,), or shares of the classes (B, C).
        smoothing: in [0, 1).
        class_weights: (C,), None for equal ones.
    """
    reduction = "mean" if class_weights is None else "none"
    return F.cross_entropy(
        logits.float(), targets, class_weights, label_smoothing=smoothing, reduction=reduction
    ).mean()


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images are classified as what they are, of mixed ones as what they are most; a scalar."""
    best = logits.argmax(1)
    if targets.ndim == 1:
        return (best == targets).sum()
    return (targets.gather(1, best[:, None])[:, 0] == targets.amax(1)).sum()
