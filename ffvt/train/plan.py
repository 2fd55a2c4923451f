"""The largest batch that fits a memory, and the speed to expect: what `ffvt plan` prints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from json import dumps as to_json
from pathlib import Path

import torch

from ffvt.errors import require
from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.cost import flops_per_image, num_parameters
from ffvt.model.registry import is_timm
from ffvt.precision import AUTO
from ffvt.rates import fastest_precision, matmul_rates, rates_line
from ffvt.train.memory import Memory, training_memory
from ffvt.train.options import TrainOptions

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
USABLE = 0.9  # of the memory: the rest is for kernels' scratch, what the allocator loses, and the formula's error
# Fraction of the matmul rate that a training step reaches, with what it computes twice: ViT-B/16 at 448, batch 4, bf16,
# on 2 cores of an AMD EPYC. benchmarks/results: model.jsonl has 5.626 s a step (plain ViT: 7.770 s) and
# maws_attention.jsonl 419.5 GFLOP/s of matmul; four images are 1647 (1799) GFLOP. In fp32 FFVT reaches 0.77.
# A TransFG's are counted as the plain ViT's, of which its blocks are.
EFFICIENCY = {"ffvt": 0.70, "vit": 0.55, "transfg": 0.55}  # by the kind of model
NAMES = {"ffvt": "FFVT", "transfg": "TransFG", "vit": "plain ViT"}
MEASURED_ON = "ViT-B/16 at 448, bf16, 2 CPU cores; not measured on a GPU yet"
MAX_BATCH = 1 << 20
PRODUCTS = "  products alone, the rest on top"  # a row of the table
ALONE = "products alone: an estimate from below, at the whole rate of matrix products"
GRADIENTS = "gradients: of those there are at the peak, which is early in the backward"


@dataclass(frozen=True)
class Plan:
    """What a device can be expected to train.

    Attributes:
        batch_size: the largest batch that fits.
        memory: what it takes, bytes.
        images_per_second: to expect.
        flops_per_image: of training, with what it computes twice.
        parameters: of the model.
        usable_memory: bytes that the step may take, of those given.
        matmul_flops: operations per second of large matrix products.
        efficiency: the fraction of them that training is taken to reach.
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
        config: the model's.
        memory_bytes: of the device.
        matmul_flops: operations per second of its large matrix products.
        optimizer, precision, ema, device: as for `training_memory`.
        efficiency: the fraction of matmul_flops that training reaches; None for what was measured on a CPU.

    Raises:
        ValueError: an argument does not hold, or not even one image fits; the message says what that needs.
        NotImplementedError: the hybrid.
    """
    reached = EFFICIENCY[config.kind] if efficiency is None else efficiency
    require(0 < memory_bytes < math.inf, "plan", "memory_bytes", "positive", memory_bytes)
    require(0 < matmul_flops < math.inf, "plan", "matmul_flops", "positive", matmul_flops)
    require(0 < reached <= 1, "plan", "efficiency", "in (0, 1]", efficiency)
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
    rate = matmul_flops * reached / flops
    return Plan(fits, needed(fits), rate, flops, num_parameters(config), usable, matmul_flops, reached)


def parse_bytes(text: str) -> int:
    """ "24GiB" or "512 MB" as bytes.

    Raises:
        ValueError: it is no such size, has no unit, or is less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    require(size > 0, "plan", "memory", "a size with its unit, such as 24GiB or 512MB", text)
    return size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device.

    Raises:
        ValueError: this system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", facts.read_text()) if facts.exists() else None
    if not found:
        raise ValueError("plan: memory must be given where the system does not say what is free; got memory=''")
    return int(found[1]) * 1024


def describe_plan(
    options: TrainOptions,
    memory: str = "",
    tflops: float | None = None,
    efficiency: float | None = None,
    num_classes: int = 200,
    json: bool = False,
) -> str:
    """The plan of a run, trained as FFVT (or TransFG) and, beside it, as the plain ViT of its size: a table for a
    terminal.

    Args:
        options: those of the run; its device need not be here.
        memory: of the device, such as "24GiB"; empty for what is free here.
        tflops: matmul rate of the device in the run's precision, TFLOP/s; None to measure the rates here.
        efficiency: fraction of it that training reaches; None for what was measured on a CPU.
        num_classes: classes.
        json: a JSON object instead of a table.

    Raises:
        ValueError: an argument does not hold, the model is the hybrid, or not even one image fits.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if options.device == "auto" else options.device
    if device == "cuda" and here == "cpu":
        require(bool(memory), "plan", "memory", "given for a GPU that is not here", memory)
        must = "given for a GPU that is not here (its dense peak in this precision; bf16: A100 312, H100 SXM 989)"
        require(tflops is not None, "plan", "tflops", must, tflops)
    require(tflops is None or 0 < tflops < math.inf, "plan", "tflops", "positive", tflops)
    must = "one of ours: memory and speed of timm's models are not predicted"
    require(not is_timm(options.model_type), "plan", "model_type", must, options.model_type)
    fields = options.model_fields(num_classes)
    plain = make_config(options.model_type, **{**fields, "feature_fusion": False, "head": "ffvt"})
    is_counted = plain.backbone is None
    require(is_counted, "plan", "model_type", "a plain ViT's size: the hybrid is not counted", options.model_type)
    available = parse_bytes(memory) if memory else free_memory(torch.device(device))
    rates = matmul_rates(device) if tflops is None else {}
    precision = options.autocast_precision
    if precision == AUTO:
        must = "fp32, bf16 or fp16 with tflops, which is the rate of one of them"
        require(bool(rates), "plan", "precision", must, precision)
        precision = fastest_precision(rates, device, options.fsdp)
    can = f"one of {', '.join(rates)}, in which this device multiplies"
    require(not rates or precision in rates, "plan", "precision", can, precision)
    rate = rates[precision] if tflops is None else tflops * 1e12
    choices = (options.optimizer, precision, options.ema_decay > 0, efficiency, device)
    other = {"head": "transfg"} if options.head == "transfg" else {"feature_fusion": True}
    selects = options.feature_fusion or options.head == "transfg"
    plans: dict[bool, Plan | None] = {True: None, False: None}
    for selecting in (not selects, selects):  # one of the two may not fit, or be no FFVT
        try:
            config = replace(plain, **other) if selecting else plain
            plans[selecting] = plan(config, available, rate, *choices)
        except ValueError:
            if selecting == selects and not any(plans.values()):
                raise
    name = NAMES[options.head]
    if json:
        found = {key: one and asdict(one) for key, one in zip((options.head, "plain_vit"), plans.values())}
        return to_json({"precision": precision, "matmul_rates": rates, **found})
    shown = f"{precision} (auto)" if options.precision == AUTO else precision
    title = (
        f"{options.model_type} at {options.img_size} px, {shown}, {options.optimizer}, {device}, "
        f"{USABLE:.0%} of {available / 2**30:.1f} GiB; memory at the peak of a step"
    )
    fractions = " and ".join(f"{found.efficiency:.0%}" for found in plans.values() if found)
    source = "measured here" if tflops is None else "given"
    reached = f"reached on {MEASURED_ON}" if efficiency is None else "given"
    basis = f"{fractions} of {rate / 1e12:.3g} TFLOP/s of matmul ({source}); fraction {reached}."
    measured = f"{rates_line(rates, device, options.fsdp)}\n" if rates else ""
    table = _table(list(plans.values()), name, options)
    return f"{title}\n{table}\n{GRADIENTS}\n{measured}images/s and times: {basis}\n{ALONE}"


def _table(plans: list[Plan | None], name: str, options: TrainOptions) -> str:
    """The plans of an FFVT or TransFG, the name, and of the plain ViT side by side, with the time that a step and a run
    of so many take, and below each what its matrix products alone take at the whole rate."""
    rows = [("", name, NAMES["vit"])]

    def add(name: str, show: Callable[[Plan], str]) -> None:
        rows.append((name, *(show(found) if found else "-" for found in plans)))

    add("parameters, M", lambda p: f"{p.parameters / 1e6:.1f}")
    add("largest batch", lambda p: str(p.batch_size))
    for part in ("weights", "gradients", "optimizer_state", "ema", "activations", "temporary", "total"):
        add(f"  {part.replace('_', ' ')}, GiB", lambda p, part=part: f"{getattr(p.memory, part) / 2**30:.2f}")
    add("GFLOP an image, forward and backward", lambda p: f"{p.flops_per_image / 1e9:.0f}")
    add("images/s expected", lambda p: f"{p.images_per_second:.3g}")

    def add_time(name: str, images: int, unit: int) -> None:
        add(name, lambda p: f"{images / p.images_per_second / unit:.3g}")
        add(PRODUCTS, lambda p: f"{images * p.flops_per_image / p.matmul_flops / unit:.3g}")

    batch = options.train_batch_size
    add_time(f"a step of {batch}, seconds", batch, 1)
    if options.epochs is None:  # else the number of steps depends on the images, which are not opened
        add_time(f"{options.num_steps} steps of {batch}, hours", options.num_steps * batch, 3600)
    return "\n".join(f"{name:<38}{ffvt:>10}{plain:>12}" for name, ffvt, plain in rows)
