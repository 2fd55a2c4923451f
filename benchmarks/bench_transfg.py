"""TransFG without its maps against its authors' form and plain ViTs: inference forward and training step.

    python -m benchmarks.bench_transfg [--model_type vit_b16] [--image_size 448] [--batch_size 4]
        [--patch_strides 16 12] [--dtype bf16] [--rivals ...] [--device cpu] [--rounds 5] [--threads 2] [--out FILE]
        [--quick]

Rivals: the authors' form, full maps multiplied layer by layer; ours; timm's plain ViT of the same size and tokens; our
plain ViT. Each patch stride is a run of its own: 16 gives 785 tokens at 448 pixels, 12 (the authors') 1,370. The two
forms of TransFG share one set of weights, the plain models another. Before any timing the gate compares, in fp32 at a
small image size, logits and gradients, and of TransFG the parts too.

forward: eval mode, no_grad. step: forward, cross entropy in fp32, backward, SGD with momentum 0.9, gradients dropped;
the contrastive loss, a product of (B, C) features, is left out for all alike. bf16 and fp16 mean autocast; the weights
are fp32 throughout, and no loss scale is used.

Prints a markdown table per stride and appends one JSON line per rival and mode to benchmarks/results/transfg.jsonl.
--quick runs tiny sizes to try the machinery; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffvt
from benchmarks import model_rivals
from benchmarks.attention_rivals import OURS
from benchmarks.authors_transfg import AuthorsTransFG
from benchmarks.bench_model import (
    GATE_GRID,
    GATE_REL,
    MODES,
    QUICK,
    Workload,
    random_batch,
    records_of,
    sharpen_attention,
)
from benchmarks.harness import Case, make_parser, measure, require_close, require_equal, save, stamp
from benchmarks.model_rivals import OURS_PLAIN, TIMM
from benchmarks.timing_tables import render
from ffvt.model.config import make_config
from ffvt.precision import PRECISIONS

AUTHORS = "authors' form"
RIVALS = (AUTHORS, OURS, TIMM, OURS_PLAIN)
BASELINES = (AUTHORS, OURS_PLAIN)


@dataclasses.dataclass(frozen=True)
class TransFGWorkload(Workload):
    """`Workload` of these rivals; config is the TransFG's."""

    def build(self) -> nn.Module:
        return build_rival(self.rival, self.config)


def build_rival(name: str, config: ffvt.FFVTConfig) -> nn.Module:
    """A rival on the CPU; both forms of TransFG with the same weights, both plain ViTs with the same."""
    torch.manual_seed(0)
    if name in model_rivals.PLAIN:
        return model_rivals.build_rival(name, dataclasses.replace(config, head="ffvt", feature_fusion=False))
    authors = AuthorsTransFG(config)
    if name == AUTHORS:
        return authors
    model = ffvt.TransFG(config)
    report = ffvt.load_weights(model, authors.state_dict())
    if report.left or report.ignored:
        raise AssertionError(f"bench_transfg: every weight must have a place; got {report}")
    return model


def check_agreement(config: ffvt.FFVTConfig, device: str) -> None:
    """The gate: in fp32 and eval mode, at a small image size, rivals of a family agree.

    Raises:
        DisagreementError: they do not.
    """
    stride = config.patch_stride or config.patch_size
    small = dataclasses.replace(config, image_size=config.patch_size + (GATE_GRID - 1) * stride)
    for expecting, name in ((AUTHORS, OURS), (TIMM, OURS_PLAIN)):
        expected, actual = (evaluate_rival(rival, small, device) for rival in (expecting, name))
        require_close(f"logits of {name} and {expecting}", actual[0], expected[0], GATE_REL)
        require_close(f"gradients of {name} and {expecting}", actual[1], expected[1], GATE_REL)
        if name == OURS:
            require_equal(f"parts of {name} and {expecting}", actual[2], expected[2])


def evaluate_rival(name: str, config: ffvt.FFVTConfig, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, the loss's gradient at the images, and the parts (B, H) of a TransFG, None of a plain one."""
    model = build_rival(name, config)
    sharpen_attention(model)
    model.to(device).eval()
    images, labels = random_batch(config, 2, device)
    images.requires_grad_()
    logits, parts = model(images), None
    if name == AUTHORS:
        parts = model.forward_with_parts(images)[2]
    elif name == OURS:
        parts = model.forward_with_selection(images)[1].index
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    return logits.detach(), gradient, parts


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate, timings and peak memory: one record per stride, mode and rival."""
    torch.set_num_threads(arguments.threads)
    sizes = {"image_size": arguments.image_size, "head": "transfg"}
    config = make_config(arguments.model_type, **sizes)
    if arguments.quick:
        config = dataclasses.replace(config, **QUICK)
    records = []
    for stride in arguments.patch_strides:
        overlapping = None if stride == config.patch_size else stride
        records += run_stride(dataclasses.replace(config, patch_stride=overlapping), arguments)
    return records


def run_stride(config: ffvt.FFVTConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = arguments.device
    shared = common_fields(config, arguments)  # before the load that the run itself makes
    shape = (config, arguments.batch_size, arguments.dtype, device)
    check_agreement(config, device)
    cases = {mode: [Case(name, TransFGWorkload(name, mode, *shape)) for name in arguments.rivals] for mode in MODES}
    timings = {mode: measure(cases[mode], arguments.rounds, arguments.warmup, device) for mode in MODES}
    return records_of(shared, cases, timings, BASELINES, arguments)


def common_fields(config: ffvt.FFVTConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What every record of a stride shares."""
    return {
        **stamp("transfg", arguments.device),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "served_by": ffvt.info()["devices"][arguments.device]["serves"],
        "parameters": {
            "model_type": "tiny" if arguments.quick else arguments.model_type,
            "image_size": config.image_size,
            "batch_size": arguments.batch_size,
            "patch_stride": config.patch_stride or config.patch_size,
            "tokens": config.num_tokens,
        },
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5, warmup=1)
    parser.add_argument("--model_type", default="vit_b16")
    parser.add_argument("--image_size", type=int, default=448, help="pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--patch_strides", type=int, nargs="+", default=(16, 12), help="pixels")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--skip_memory", action="store_true", help="no second pass for peak memory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table per stride, and appends the records."""
    arguments = parse(argv)
    records = run(arguments)
    print(render(records))
    save(records, arguments, "transfg.jsonl")


if __name__ == "__main__":
    main()
