"""What a run says before its first step: model, images, schedule, and which options look like mistakes."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

from ffvt.kernels.backends import info
from ffvt.rates import fastest_precision, rates_line, rates_text
from ffvt.train.data import Data
from ffvt.train.options import TrainOptions
from ffvt.train.state import TrainState

HIGH_ADAMW_RATE = 5e-3  # AdamW moves every weight by about the learning rate; SGD's usual rates are far larger
MUCH_FASTER = 1.5  # times the rate of fp32: worth a note to who trains in it
SMALL_SET = 20_000  # images, the largest of the authors' data sets has about as many


def announcement(state: TrainState, data: Data, rates: Mapping[str, float]) -> str:
    """The model, the images and the schedule of a run, and the rates of matrix products here, in four lines."""
    options, world = state.options, state.world
    parameters = sum(parameter.numel() for parameter in state.model.parameters()) / 1e6
    validation = "" if data.test is data.validation else f"{len(data.validation):,} {data.validation_split}, "
    batch = options.train_batch_size * world.size
    ranks = f" on {world.size} processes" if world.size > 1 else ""
    epochs = options.num_steps * batch / len(data.train)
    return (
        f"model: {options.model_type}, {kind_of(options)}, {parameters:.1f} M parameters, images of "
        f"{options.img_size} pixels\n"
        f"data: {options.dataset}, {len(data.train):,} training, {validation}{len(data.test):,} {options.eval_split} "
        f"images, {len(data.classes):,} classes\n"
        f"schedule: {options.num_steps:,} steps of {batch} images{ranks}, {epochs:.1f} epochs, in "
        f"{options.autocast_precision} on {_device(world.device)}\n"
        f"{rates_line(rates, world.device.type, options.fsdp)}"
    )


def kind_of(options: TrainOptions) -> str:
    """What is trained, with what picks and what is left out of it, and what is added to its loss."""
    if options.head == "transfg":
        kind = "TransFG, a part picked by each head"
    elif options.feature_fusion:
        by = "" if options.criterion == "maws" else f" by {options.criterion}"
        kind = f"FFVT, {options.num_token} tokens picked by each block{by}"
    else:
        kind = "plain ViT (no --feature_fusion)"
    if options.patch_stride:
        kind += f", patches {options.patch_stride} pixels apart"
    if options.keep_rate < 1:
        after = ", ".join(map(str, options.locations))
        kind += f", {options.keep_rate:.0%} of the patches kept after blocks {after}"
    return kind + ", contrastive loss" * options.contrastive


def _device(device: torch.device) -> str:
    serving = info()["devices"][device.type]["serves"]
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, attention by {serving}"
    name = f" ({platform.processor()})" if platform.processor() else ""
    return f"the CPU{name}, {torch.get_num_threads()} threads, attention by {serving}"


def advice(options: TrainOptions, images: int) -> list[str]:
    """Options that look like mistakes, each in a line. images: of the training set."""
    found = []
    if options.warmup_steps >= options.num_steps:
        found.append(
            f"warmup_steps={options.warmup_steps} is not below num_steps={options.num_steps}: the learning rate never "
            "reaches its peak"
        )
    if options.optimizer == "adamw" and options.learning_rate > HIGH_ADAMW_RATE:
        found.append(f"learning_rate={options.learning_rate:g} is a rate for SGD; AdamW usually takes 1e-5 to 1e-3")
    if options.feature_fusion and options.pretrained_dir and images < SMALL_SET and options.last_block == "random":
        found.append(
            f"the authors' defaults fit large sets; {images:,} images usually do better with the switches of "
            "--recipe finetune: --last_block pretrained --first_candidate 1 --dropout 0"
        )
    return found


def precision_advice(
    options: TrainOptions, rates: Mapping[str, float], device: str, is_resumed: bool = False
) -> list[str]:
    """The precision that would train faster than the one chosen, in a line: than a short one whose products are slower
    than fp32's, or much faster than fp32.

    rates: of matrix products by precision. device: "cpu" or "cuda". is_resumed: auto would change nothing then.
    """
    chosen, fastest = options.autocast_precision, fastest_precision(rates, device, options.fsdp)
    is_slow = rates[chosen] < rates["fp32"]
    is_missed = chosen == "fp32" and rates[fastest] >= MUCH_FASTER * rates["fp32"]
    if not (is_slow or is_missed):
        return []
    ways = f"--precision {fastest}" + " or auto" * (not is_resumed) + " without --fp16" * options.fp16
    both = rates_text({name: rates[name] for name in (chosen, fastest)})
    return [f"matrix products run at {both} here: {ways} trains faster"]
