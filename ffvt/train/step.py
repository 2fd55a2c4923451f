"""One optimiser step: accumulate, unscale, clip, and skip where a gradient or the loss is not finite."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ffvt.data.transforms import Recipe, augment
from ffvt.precision import autocast
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
    """`augment` by a recipe, into memory that is written over: fresh memory costs more than the arithmetic."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.pixels: Tensor | None = None

    def __call__(self, images: Tensor, jitter: Tensor | None = None) -> Tensor:
        """Images (B, 3, S, S) uint8 as the model's input, fp32; valid until the next call."""
        self.pixels = augment(images, jitter, self.recipe, out=self.pixels)
        return self.pixels


def training_step(
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    jitter: Tensor | None,
    prepare: Preparation,
    stop: bool = False,
) -> StepResult:
    """One step on this rank's batch, in `gradient_accumulation_steps` parts.

    A step with an inf or a NaN in the loss or the gradients of any rank changes no weight and does not advance the
    schedule; in fp16 it halves the loss scale.

    Args:
        state: what the step changes.
        images: (B, 3, S, S) uint8.
        labels: (B,) int64.
        jitter: (B, 4), the colours' factors from the training view; None for none.
        prepare: takes images to the model's input.
        stop: this process was asked to stop, which all ranks have to know at the same step.
    """
    options, world = state.options, state.world
    parts = options.gradient_accumulation_steps
    loss = torch.zeros((), device=world.device)
    correct = torch.zeros((), device=world.device)
    images = images.to(world.device, non_blocking=True)
    labels = labels.to(world.device, non_blocking=True)
    jitters = [None] * parts if jitter is None else jitter.chunk(parts)
    for part, (x, y, factors) in enumerate(zip(images.chunk(parts), labels.chunk(parts), jitters), start=1):
        with nullcontext() if part == parts else gradients_stay_local(state.parallel):
            pixels = prepare(x, factors)
            with autocast(world.device, options.autocast_precision):
                logits = state.parallel(pixels)
            part_loss = F.cross_entropy(logits.float(), y, label_smoothing=options.smoothing_value) / parts
            state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
        correct += (logits.detach().argmax(1) == y).sum()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), options.max_grad_norm or float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    skip, stop = world.any(not bool(torch.isfinite(norm) & torch.isfinite(loss)), stop)  # the host waits here
    if not skip:
        state.scaler.step(state.optimizer)
        state.scheduler.step()
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.meter.add(loss, correct, len(labels), norm)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.samples += len(labels) * world.size
    state.skipped += skip
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skip else 0
    return StepResult(loss, norm, skip, stop)
