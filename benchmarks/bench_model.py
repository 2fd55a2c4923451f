"""The whole model against its rivals: inference forward and training step.

    python -m benchmarks.bench_model [--model_type vit_b16] [--image_size 448] [--batch_size 4] [--num_select 12]
        [--dtype bf16] [--device cpu] [--rounds 10] [--threads 2] [--out FILE] [--rivals NAME ...] [--quick]

Rivals: the authors' eager form; "composition", our model with every row computed and on plain PyTorch operators; ours
as it comes; timm's plain ViT of the same size; our plain ViT; where it is asked for, ours by torch.compile. The fusion
models share one set of weights, the plain ones another. Before any timing the gate compares logits, picks and gradients
in fp32 at a small image size.

forward: eval mode, no_grad. step: forward, cross entropy in fp32, backward, SGD with momentum 0.9, gradients dropped.
bf16 and fp16 mean autocast; the weights are fp32 throughout, and no loss scale is used.

Prints a markdown table and appends one JSON line per rival and mode to benchmarks/results/model.jsonl. --quick runs
tiny sizes to try the machinery; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffvt
from benchmarks.attention_rivals import EAGER
from benchmarks.authors_eager import AuthorsEagerFFVT
from benchmarks.harness import (
    Case,
    Timing,
    describe_error,
    make_parser,
    measure,
    require_close,
    require_equal,
    save,
    speedups,
    stamp,
)
from benchmarks.memory import peak_memory
from benchmarks.model_rivals import FUSION, OURS_COMPILED, PLAIN, TIMM, backend_of, build_rival
from benchmarks.timing_tables import render_table
from ffvt.model.config import make_config
from ffvt.precision import PRECISIONS, autocast

MODES = ("forward", "step")
LEARNING_RATE = 1e-3
QUICK = {"image_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_dim": 128}
GATE_REL = 1e-4
GATE_GRID = 5  # patches along the gate's image: 26 tokens
GATE_SHARPNESS = 3.0  # factor on query and key weights: flat attention leaves scores too close for equal picks


@dataclass(frozen=True)
class Workload:
    """One rival in one mode; called, it builds everything and returns the function to time."""

    rival: str
    mode: str
    config: ffvt.FFVTConfig
    batch_size: int
    dtype: str
    device: str

    def __call__(self) -> Callable[[], None]:
        model = self.build().to(self.device).train(self.mode == "step")
        images, labels = random_batch(self.config, self.batch_size, self.device)
        if self.mode == "forward":
            return partial(self.infer, model, images)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        return partial(self.step, model, images, labels, optimizer)

    def build(self) -> nn.Module:
        return build_rival(self.rival, self.config)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with backend_of(self.rival), autocast(torch.device(self.device), self.dtype):
            return model(images)

    def infer(self, model: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            self.logits(model, images)

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss = F.cross_entropy(self.logits(model, images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def random_batch(config: ffvt.FFVTConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B,), the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, config.image_size, config.image_size, generator=generator)
    labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
    return images.to(device), labels.to(device)


def check_agreement(config: ffvt.FFVTConfig, device: str) -> None:
    """The gate: in fp32 and eval mode, at a small image size, rivals of a family agree.

    Fusion: logits, picks, and the gradient at the images. Plain: logits and that gradient.

    Raises:
        DisagreementError: they do not.
    """
    select = min(config.num_select, GATE_GRID**2 // 2)
    small = dataclasses.replace(config, image_size=GATE_GRID * config.patch_size, num_select=select)
    for family in (FUSION, PLAIN):
        expected = evaluate_rival(family[0], small, device)
        for name in family[1:]:
            actual = evaluate_rival(name, small, device)
            require_close(f"logits of {name} and {family[0]}", actual[0], expected[0], GATE_REL)
            require_close(f"gradients of {name} and {family[0]}", actual[1], expected[1], GATE_REL)
            if family is FUSION:
                require_equal(f"picks of {name} and {family[0]}", actual[2], expected[2])


def evaluate_rival(name: str, config: ffvt.FFVTConfig, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, the loss's gradient at the images, and the picks (B, L-1, K) of a fusion model, None of a plain one."""
    model = build_rival(name, config)
    sharpen_attention(model)
    model.to(device).eval()
    images, labels = random_batch(config, 2, device)
    images.requires_grad_()
    with backend_of(name):
        logits, index = _classify(model, images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    return logits.detach(), gradient, index


def _classify(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(model, AuthorsEagerFFVT):
        return model.forward_with_index(images)
    if isinstance(model, ffvt.FFVT) and model.config.feature_fusion:
        logits, selection = model.forward_with_selection(images)
        return logits, selection.index
    return model(images), None


@torch.no_grad()
def sharpen_attention(model: nn.Module) -> None:
    """Multiplies the query and key weights of every attention, in any of the rivals' layouts."""
    for name, weight in model.named_parameters():
        if name.endswith(("attn.query.weight", "attn.key.weight")):
            weight.mul_(GATE_SHARPNESS)
        elif name.endswith("attn.qkv.weight"):
            weight[: 2 * weight.shape[1]].mul_(GATE_SHARPNESS)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate, timings and peak memory: one record per mode and rival."""
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    config = make_config(arguments.model_type, image_size=arguments.image_size, num_select=arguments.num_select)
    if arguments.quick:
        config = dataclasses.replace(config, **QUICK)
    common = common_fields(config, arguments)  # before the load that the run itself makes
    gate = partial(check_agreement, config, device)
    cases = {mode: model_cases(config, mode, arguments) for mode in MODES}
    timings: dict[str, dict[str, Timing]] = {}
    for mode in MODES:
        timings[mode] = measure(cases[mode], arguments.rounds, arguments.warmup, device, None if timings else gate)
    return records_of(common, cases, timings, (EAGER, TIMM), arguments)


def records_of(
    common: dict[str, Any],
    cases: dict[str, list[Case]],
    timings: dict[str, dict[str, Timing]],
    baselines: Sequence[str],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A record per mode and rival: `common`, its times, its speed-up over every baseline, and its peak memory, for
    which each runs once more, alone."""
    measured = [case for mode in cases for case in cases[mode]]
    peaks = iter([None] * len(measured) if arguments.skip_memory else peak_memory(measured, arguments.device))
    return [
        {**common, "mode": mode, **line, "peak_memory_bytes": next(peaks)}
        for mode in cases
        for line in timing_fields(timings[mode], baselines)
    ]


def common_fields(config: ffvt.FFVTConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What every record of a run shares."""
    return {
        **stamp("model", arguments.device),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "served_by": ffvt.info()["devices"][arguments.device]["serves"],
        "parameters": {
            "model_type": "tiny" if arguments.quick else arguments.model_type,
            "image_size": config.image_size,
            "batch_size": arguments.batch_size,
            "num_select": config.num_select,
        },
    }


def timing_fields(timings: dict[str, Timing], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """One mode's numbers, a dict per rival."""
    against = {baseline: speedups(timings, baseline) for baseline in baselines if baseline in timings}
    return [
        {
            "case": name,
            "time_ms": timing.to_dict(),
            "speedup": {baseline: found[name] for baseline, found in against.items()},
        }
        for name, timing in timings.items()
    ]


def model_cases(config: ffvt.FFVTConfig, mode: str, arguments: argparse.Namespace) -> list[Case]:
    """The chosen rivals in one mode; the two baselines are always among them."""
    shape = (config, arguments.batch_size, arguments.dtype, arguments.device)
    return [Case(name, Workload(name, mode, *shape)) for name in arguments.rivals]


def measure_alone(workload: Workload, rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """The record of one rival in one mode, for models that do not fit a GPU side by side.

    It has `time_ms` and `images_per_second`; or `missing`: timm is not installed, or the memory does not suffice.
    """
    config, batch = workload.config, workload.batch_size
    fields = {
        "parameters": {"batch": batch, "image_size": config.image_size},
        "dtype": workload.dtype,
        "case": workload.rival,
        "mode": workload.mode,
    }
    try:
        timing = measure([Case(workload.rival, workload)], rounds, warmup, workload.device)[workload.rival]
    except (ImportError, torch.OutOfMemoryError) as error:
        yield {**fields, "missing": describe_error(error)}
    else:
        yield {**fields, "time_ms": timing.to_dict(), "images_per_second": round(batch / timing.median * 1e3, 1)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=10, warmup=2)
    parser.add_argument("--model_type", default="vit_b16")
    parser.add_argument("--image_size", type=int, default=448, help="pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_select", type=int, default=12)
    parser.add_argument("--dtype", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rivals", nargs="+", choices=(*FUSION, *PLAIN, OURS_COMPILED), default=(*FUSION, *PLAIN))
    parser.add_argument("--skip_memory", action="store_true", help="no second pass for peak memory")
    arguments = parser.parse_args(argv)
    if not {EAGER, TIMM} <= set(arguments.rivals):
        parser.error(f"--rivals must name both baselines, {EAGER!r} and {TIMM!r}; got {list(arguments.rivals)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and appends the records."""
    arguments = parse(argv)
    records = run(arguments)
    print(render_table(records))
    save(records, arguments, "model.jsonl")


if __name__ == "__main__":
    main()
