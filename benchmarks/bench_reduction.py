"""Inference with token reduction against the same models with every token.

    python -m benchmarks.bench_reduction [--model_type vit_b16] [--image_size 448] [--batch_size 4] [--num_select 12]
        [--keep_rate 0.7] [--locations 3 6 9] [--dtypes fp32 bf16] [--device cpu] [--rounds 10] [--threads 2]
        [--out FILE] [--quick]

Models: our plain ViT, our FFVT, and a ViT of timm made an FFVT, all with the weights of one ViT of timm; each with
every token and with keep_rate after the blocks of --locations. Before any timing the gate compares logits: with
keep_rate=1 they are those of the model that was never told of it, bit for bit; with --keep_rate those of our FFVT and
of timm's agree, and so do the picks, at a small image size in fp32.

The forward is timed in eval mode, under no_grad; bf16 and fp16 mean autocast. Beside the speed-up stands that of the
operations, which PyTorch's counter counts: what the reduction could bring if all products ran at one rate.

Prints markdown tables and appends one JSON line per dtype and model to benchmarks/results/reduction.jsonl. --quick runs
tiny sizes; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ffvt
from benchmarks.bench_model import random_batch, sharpen_attention
from benchmarks.harness import Case, make_parser, measure, require_close, require_equal, save, speedups, stamp
from benchmarks.model_rivals import build_timm_vit
from benchmarks.timing_tables import render
from ffvt.model.config import make_config
from ffvt.model.cost import count_flops
from ffvt.model.ffvt import from_config
from ffvt.precision import PRECISIONS, autocast

PLAIN, OURS, TIMM = "plain ViT", "FFVT", "fused timm ViT"
MODELS = (PLAIN, OURS, TIMM)
FULL, BY_OPERATIONS = "every token", "every token, by operations"
QUICK = {"image_size": 96, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128, "locations": (0, 1)}
GATE_GRID, GATE_REL = 5, 1e-4  # patches along the gate's image


def build(name: str, config: ffvt.FFVTConfig) -> nn.Module:
    """A model of a configuration, on the CPU, in eval mode; all have the same weights."""
    torch.manual_seed(0)
    vit = build_timm_vit(config)
    if name == TIMM:
        selection = (config.num_select, config.num_classes, config.first_candidate, config.criterion)
        model = ffvt.add_feature_fusion(vit, *selection, config.keep_rate, config.locations)
    else:
        model = from_config(dataclasses.replace(config, feature_fusion=name == OURS))
        ffvt.load_weights(model, vit.state_dict(), last_block="pretrained")
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


@dataclass(frozen=True)
class Inference:
    """One model; called, it builds everything and returns the function to time."""

    model: str
    config: ffvt.FFVTConfig
    batch_size: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return self.model if self.config.keep_rate == 1 else f"{self.model}, keep {self.config.keep_rate:g}"

    def __call__(self) -> Callable[[], None]:
        images, _ = random_batch(self.config, self.batch_size, self.device)
        return partial(self.infer, build(self.model, self.config).to(self.device), images)

    def infer(self, model: nn.Module, images: Tensor) -> None:
        with torch.no_grad(), autocast(torch.device(self.device), self.dtype):
            model(images)

    def flops(self) -> int:
        """Operations of one image."""
        return count_flops(build(self.model, self.config).to("meta"), self.config.image_size)


def check_agreement(config: ffvt.FFVTConfig, device: str) -> None:
    """The gate.

    Raises:
        DisagreementError: models that should agree do not.
    """
    select = min(config.num_select, GATE_GRID)
    small = dataclasses.replace(config, image_size=GATE_GRID * config.patch_size, num_select=select)
    full = dataclasses.replace(small, keep_rate=1.0)
    untold = dataclasses.replace(full, locations=ffvt.FFVTConfig.locations)
    for name in MODELS:
        require_equal(
            f"logits of {name} with keep_rate=1", *(evaluate(name, told, device)[0] for told in (full, untold))
        )
    (logits, index), (expected, expected_index) = (evaluate(name, small, device) for name in (TIMM, OURS))
    require_close(f"logits of {TIMM} and {OURS}", logits, expected, GATE_REL)
    require_equal(f"picks of {TIMM} and {OURS}", index, expected_index)


@torch.no_grad()
def evaluate(name: str, config: ffvt.FFVTConfig, device: str) -> tuple[Tensor, Tensor | None]:
    """Logits, and the picks (B, L-1, K), None of a plain model."""
    model = build(name, config).to(device)
    sharpen_attention(model)
    images, _ = random_batch(config, 2, device)
    if name == PLAIN:
        return model(images), None
    logits, selection = model.forward_with_selection(images)
    return logits, selection.index


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate and timings: one record per dtype and model."""
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    config = make_config(arguments.model_type, num_select=arguments.num_select, image_size=arguments.image_size)
    chosen = {"keep_rate": arguments.keep_rate, "locations": tuple(arguments.locations)}
    config = dataclasses.replace(config, **{**chosen, **(QUICK if arguments.quick else {})})
    common = {
        **stamp("reduction", device),
        "device": device,
        "served_by": ffvt.info()["devices"][device]["serves"],
        "parameters": {
            "model_type": "tiny" if arguments.quick else arguments.model_type,
            "image_size": config.image_size,
            "batch_size": arguments.batch_size,
            "num_select": config.num_select,
            "keep_rate": config.keep_rate,
            "locations": config.locations,
        },
    }
    check_agreement(config, device)
    return [
        {**common, "dtype": dtype, **line} for dtype in arguments.dtypes for line in of_dtype(config, dtype, arguments)
    ]


def of_dtype(config: ffvt.FFVTConfig, dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The numbers of every model, with every token and with fewer."""
    rates = (dataclasses.replace(config, keep_rate=1.0), config)
    pairs = {
        name: [Inference(name, rate, arguments.batch_size, dtype, arguments.device) for rate in rates]
        for name in MODELS
    }
    cases = [Case(str(inference), inference) for pair in pairs.values() for inference in pair]
    timings = measure(cases, arguments.rounds, arguments.warmup, arguments.device)
    for pair in pairs.values():
        against = speedups(timings, str(pair[0]))
        whole = pair[0].flops()
        for inference in pair:
            flops, case = inference.flops(), str(inference)
            yield {
                "mode": "forward",
                "case": case,
                "time_ms": timings[case].to_dict(),
                "speedup": {FULL: against[case], BY_OPERATIONS: {"medians": round(whole / flops, 4)}},
                "flops_per_image": flops,
                "peak_memory_bytes": None,
            }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=10, warmup=2)
    parser.add_argument("--model_type", default="vit_b16")
    parser.add_argument("--image_size", type=int, default=448, help="pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_select", type=int, default=12)
    parser.add_argument("--keep_rate", type=float, default=0.7)
    parser.add_argument("--locations", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    arguments = parser.parse_args(argv)
    if not 0 < arguments.keep_rate < 1:
        parser.error(f"--keep_rate must be above 0 and below 1; got {arguments.keep_rate}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and appends the records."""
    arguments = parse(argv)
    records = run(arguments)
    print(render(records))
    save(records, arguments, "reduction.jsonl")


if __name__ == "__main__":
    main()
