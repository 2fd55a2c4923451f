"""`ffvt plan`: the largest batch that fits a memory, and the images per second to expect."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.cost import flops_per_image, num_parameters
from ffvt.precision import DTYPES, PRECISIONS
from ffvt.train.memory import OPTIMIZER_TENSORS, Memory, training_memory
from ffvt.train.throughput import measure_matmul_flops

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
USABLE = 0.9  # of the memory: the rest is for kernels' scratch, what the allocator loses, and the formula's error
# Share of the matmul rate that a training step reaches, with what it computes twice: ViT-B/16 at 448, batch 4, bf16 on
# 2 cores of an AMD EPYC. benchmarks/results: model.jsonl has 5.626 s a step (plain ViT: 7.770 s) and
# maws_attention.jsonl 419.5 GFLOP/s of matmul; four images are 1647 (1799) GFLOP. In fp32 FFVT reaches 0.77.
EFFICIENCY = {True: 0.70, False: 0.55}  # by feature_fusion
MEASURED_ON = "ViT-B/16 at 448, bf16, 2 CPU cores; not measured on a GPU yet"
MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class Plan:
    """The largest batch that fits, the memory it takes, the images per second to expect, and what that rests on.

    flops_per_image: of training, with what it computes twice. usable_memory: bytes the step may take, of those given.
    matmul_flops: operations per second; efficiency: the share of them that training is taken to reach.
    """

    batch_size: int
    memory: Memory
    images_per_second: float
    flops_per_image: int
    parameters: int
    usable_memory: int
    matmul_flops: float
    efficiency: float


def plan(
    config: FFVTConfig,
    memory_bytes: int,
    matmul_flops: float,
    optimizer: str = "sgd",
    precision: str = "fp32",
    ema: bool = False,
    efficiency: float | None = None,
    device: str = "cpu",
) -> Plan:
    """The largest batch whose training step fits 90 % of a memory, on one device.

    Args:
        memory_bytes: of the device. matmul_flops: operations per second of its large matrix products.
        optimizer, precision, ema, device: as for `training_memory`.
        efficiency: the share of matmul_flops that training reaches; None for what was measured on a CPU.

    Raises:
        ValueError: an argument does not hold, or not even one image fits; the message says what that needs.
        NotImplementedError: the hybrid.
    """
    share = EFFICIENCY[config.feature_fusion] if efficiency is None else efficiency
    _require(0 < memory_bytes < math.inf, "memory_bytes", "positive", memory_bytes)
    _require(0 < matmul_flops < math.inf, "matmul_flops", "positive", matmul_flops)
    _require(0 < share <= 1, "efficiency", "in (0, 1]", efficiency)
    usable = int(memory_bytes * USABLE)

    def needed(batch_size: int) -> Memory:
        return training_memory(config, batch_size, optimizer, precision, ema, device)

    if needed(1).total > usable:
        raise ValueError(
            f"plan: memory must hold one image, {needed(1).total / 2**30:.2f} GiB; got {usable / 2**30:.2f} GiB usable"
            ". Gradient checkpointing, smaller images, a smaller model or --fsdp over several devices need less"
        )
    fits, too_many = 1, MAX_BATCH
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle).total <= usable else (fits, middle)
    flops = flops_per_image(config, training=True, recomputation=True)
    rate = matmul_flops * share / flops
    return Plan(fits, needed(fits), rate, flops, num_parameters(config), usable, matmul_flops, share)


def _require(holds: bool, name: str, must: str, value: object) -> None:
    if not holds:
        raise ValueError(f"plan: {name} must be {must}; got {name}={value!r}")


def parse_bytes(text: str) -> int:
    """ "24GiB", "512 MB" or a plain number as bytes.

    Raises:
        ValueError: it is none of these, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    _require(size > 0, "memory", "a size such as 24GiB or 512MB", text)
    return size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device.

    Raises:
        ValueError: this system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", facts.read_text()) if facts.exists() else None
    if not found:
        raise ValueError("plan: memory must be given where the system does not tell what is free; got memory=''")
    return int(found[1]) * 1024


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ffvt plan` to a parser."""
    add = parser.add_argument
    add("--model_type", default="ViT-B_16", help="model size (default: ViT-B_16)")
    add("--img_size", type=int, default=448, help="side of the image, pixels (default: 448)")
    add("--num_token", type=int, default=12, help="tokens picked by each block (default: 12)")
    add("--num_classes", type=int, default=200, help="classes (default: 200)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="planned for; it need not be here")
    add("--memory", default="", help="of the device, such as 24GiB (default: what is free here)")
    add("--precision", choices=PRECISIONS, default="bf16", help="default: bf16")
    add("--optimizer", choices=tuple(OPTIMIZER_TENSORS), default="sgd", help="default: sgd")
    add("--dropout", type=float, default=0.1, help="dropout rate (default: 0.1)")
    add("--ema", action="store_true", help="a moving average of the weights is kept")
    add("--gradient_checkpointing", action="store_true", help="activations are recomputed")
    add("--tflops", type=float, help="matmul rate of the device, TFLOP/s (default: measured here)")
    add("--efficiency", type=float, help="share of it that training reaches (default: as measured on a CPU)")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan for an FFVT and, beside it, for the plain ViT of its size; exit status 0.

    Raises:
        ValueError: a flag does not hold, the model is the hybrid, or not even one image fits.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = getattr(arguments, "device", "auto")  # a caller may do without this flag
    device = here if device == "auto" else device
    if device == "cuda" and here == "cpu":
        _require(bool(arguments.memory), "memory", "given for a GPU that is not here", arguments.memory)
        _require(arguments.tflops is not None, "tflops", "given for a GPU that is not here", arguments.tflops)
    memory = parse_bytes(arguments.memory) if arguments.memory else free_memory(torch.device(device))
    if arguments.tflops is None:
        rate = measure_matmul_flops(torch.device(device), DTYPES[arguments.precision])
    else:
        _require(0 < arguments.tflops < math.inf, "tflops", "positive", arguments.tflops)
        rate = arguments.tflops * 1e12
    ffvt = make_config(
        arguments.model_type,
        image_size=arguments.img_size,
        num_select=arguments.num_token,
        num_classes=arguments.num_classes,
        dropout=arguments.dropout,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    _require(ffvt.backbone is None, "model_type", "a plain ViT's size: the hybrid is not counted", arguments.model_type)
    choices = (arguments.optimizer, arguments.precision, arguments.ema, arguments.efficiency, device)
    plans: list[Plan | None] = [plan(ffvt, memory, rate, *choices)]
    try:
        plans.append(plan(replace(ffvt, feature_fusion=False), memory, rate, *choices))
    except ValueError:  # the control needs a little more than what was asked about
        plans.append(None)
    if arguments.json:
        print(json.dumps({name: found and asdict(found) for name, found in zip(("ffvt", "plain_vit"), plans)}))
    else:
        print(_render(plans, arguments, memory, device))
    return 0


def _render(plans: list[Plan | None], arguments: argparse.Namespace, memory: int, device: str) -> str:
    """The plans of an FFVT and of the plain ViT as a table."""
    rows = [("", "FFVT", "plain ViT")]

    def add(name: str, show: Callable[[Plan], str]) -> None:
        rows.append((name, *(show(found) if found else "-" for found in plans)))

    add("parameters, M", lambda p: f"{p.parameters / 1e6:.1f}")
    add("largest batch", lambda p: str(p.batch_size))
    for part in ("weights", "gradients", "optimizer_state", "ema", "activations", "temporary", "total"):
        add(f"  {part.replace('_', ' ')}, GiB", lambda p, part=part: f"{getattr(p.memory, part) / 2**30:.2f}")
    add("GFLOP an image, forward and backward", lambda p: f"{p.flops_per_image / 1e9:.0f}")
    add("images/s expected", lambda p: f"{p.images_per_second:.3g}")
    table = "\n".join(f"{name:<38}{ffvt:>10}{plain:>12}" for name, ffvt, plain in rows)
    shares = " and ".join(f"{found.efficiency:.0%}" for found in plans if found)
    told = f"reached on {MEASURED_ON}" if arguments.efficiency is None else "given"
    source = "measured here" if arguments.tflops is None else "given"
    return (
        f"{arguments.model_type} at {arguments.img_size} px, {arguments.precision}, {arguments.optimizer}, {device}, "
        f"{USABLE:.0%} of {memory / 2**30:.1f} GiB; memory at the peak of a step\n{table}\n"
        f"images/s: {shares} of {plans[0].matmul_flops / 1e12:.3g} TFLOP/s of matmul ({source}); share {told}."
    )
