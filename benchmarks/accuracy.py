"""Error ratios of a backend: its error against fp64 truth over that of plain matmuls in the same dtype, per output.

    python -m benchmarks.accuracy [--backend triton] [--device cuda] [--out FILE]

The bar: out at most 2, gradients at most 3 (root mean square). Picks: equal on every image whose K-th and (K+1)-th true
scores lie further apart than four times the error of the scores; the rest are counted as ambiguous. Without a GPU,
TRITON_INTERPRET=1 checks the Triton kernels, in fp32 and fp16. Prints a markdown table and appends JSON lines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ffvt
from benchmarks.harness import RESULTS, append_results, environment
from benchmarks.oracle import explicit, rms, truth
from benchmarks.outcome_tables import render_error_ratios
from ffvt.precision import PRECISIONS, dtype_of

SHAPES = ((2, 7, 3, 32), (1, 129, 2, 32), (1, 197, 3, 80), (1, 66, 2, 96), (2, 64, 1, 128), (1, 577, 2, 64))  # B N H D
LARGE = ((8, 197, 12, 64), (8, 577, 12, 64), (8, 785, 12, 64), (4, 1025, 16, 80), (4, 785, 8, 128))
BARS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
NUM_SELECT = 5


def served_dtypes(backend: str, device: str) -> list[str]:
    """All dtypes; Triton's interpreter multiplies bf16 matrices wrongly."""
    interpreted = backend == "triton" and device == "cpu"
    return [name for name in PRECISIONS if not (interpreted and name == "bf16")]


def compare(shape: tuple[int, int, int, int], dtype: str, backend: str, device: str) -> dict[str, Any]:
    """The ratios of one shape, whether the unambiguous picks are equal, and how many images are ambiguous."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (1.5 * torch.randn(shape, generator=generator)).to(device, dtype_of(dtype)).requires_grad_() for _ in range(3)
    ]
    scale = shape[3] ** -0.5
    grad_out = torch.randn(shape, generator=generator).to(device, dtype_of(dtype))
    with ffvt.use_backend(backend):
        out, index, score = ffvt.maws_attention(*inputs, NUM_SELECT)
        grads = torch.autograd.grad(out, inputs, grad_out)
    theirs = explicit(*inputs, scale)
    theirs = (theirs, *torch.autograd.grad(theirs, inputs, grad_out))
    wide = [t.detach().double().requires_grad_() for t in inputs]
    true_out, true_score = truth(*wide, scale)
    true = (true_out, *torch.autograd.grad(true_out, wide, grad_out.double()))
    ratios = {
        name: round(rms(mine, exact) / rms(other, exact), 3)
        for name, mine, other, exact in zip(BARS, (out, *grads), theirs, true)
    }
    error = (score.double() - true_score).abs().amax(1)
    ranked = true_score.sort(descending=True).values
    clear = ranked[:, NUM_SELECT - 1] - ranked[:, NUM_SELECT] > 4 * error
    same = index.sort().values == true_score.topk(NUM_SELECT).indices.sort().values
    return {
        "ratios": ratios,
        "score_error": (error / true_score.amax(1)).max().item(),
        "picks_equal": bool(same[clear].all()),
        "ambiguous_images": int((~clear).sum()),
    }


def measure(
    shapes: Iterable[tuple[int, int, int, int]], dtypes: Sequence[str], backend: str, device: str
) -> Iterator[dict[str, Any]]:
    """A record per shape and dtype."""
    for shape in shapes:
        for dtype in dtypes:
            yield {"backend": backend, "shape": shape, "dtype": dtype, **compare(shape, dtype, backend, device)}


def passes(record: dict[str, Any]) -> bool:
    """Whether every ratio is within its bar and the clear picks are equal."""
    return record["picks_equal"] and all(record["ratios"][name] <= bar for name, bar in BARS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", choices=("triton", "cpp", "torch"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, help="all that the backend serves")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.jsonl")
    arguments = parser.parse_args(argv)
    backend, device = arguments.backend, arguments.device
    shapes = (*SHAPES, *LARGE) if device == "cuda" else SHAPES
    common = {"benchmark": "accuracy", "environment": environment(device)}
    measured = measure(shapes, arguments.dtypes or served_dtypes(backend, device), backend, device)
    records = [{**common, **record} for record in measured]
    print(render_error_ratios(records))
    append_results(arguments.out, records)
    return 0 if all(passes(record) for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
