"""attention_stats and attention_vecmat, as the C++ kernels, against what they are made of and the same in PyTorch.

    python -m benchmarks.bench_attention_stats [--dtypes fp32 bf16 fp16] [--batch_size 4] [--tokens 785] [--heads 12]
        [--head_dim 64] [--rounds 20] [--threads 1] [--out FILE] [--quick]

attention_stats: against the same kernel without the class token's row and column, in four times as many rounds.
attention_vecmat, with lse given and without: against PyTorch's operators that make the softmax map and multiply the
weights by it, for all rows at once and for 128 at a time; with the map in fp32, and in 16 bits also kept in the dtype;
and against the kernel's own products q kT, whose tiles are dropped. Products of fp16 are made in fp32 in PyTorch too,
as that is faster there. q and k are views of one packed tensor.

Before any timing the gate compares results. Prints a markdown table per dtype and appends one JSON line per dtype,
operator and rival to benchmarks/results/attention_stats.jsonl. --quick runs one tiny size; it writes only where --out
says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ffvt
from benchmarks.attention_rivals import OURS
from benchmarks.harness import Case, make_parser, measure, require_close, require_equal, save, speedups, stamp
from benchmarks.problem import Problem
from benchmarks.timing_tables import render
from ffvt.precision import PRECISIONS

WITHOUT_LINES = "without statistics"
MAP, NARROW_MAP, ROWS = "map in PyTorch", "map in PyTorch, in 16 bits", "128 rows at a time in PyTorch"
PRODUCTS = "its products alone"
STATS, GIVEN, RECOMPUTED = "attention_stats", "attention_vecmat, lse given", "attention_vecmat"
BASELINES = (WITHOUT_LINES, MAP, PRODUCTS)
MORE_ROUNDS = {STATS: 4}  # a difference of a hundredth needs more samples
GATE_REL = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # PyTorch's logits of 16 bits are rounded; ours never are
QUICK = {"batch_size": 1, "tokens": 150, "heads": 2, "head_dim": 16}

Rivals = dict[str, Callable[[], Any]]


def times_map(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weights (B, H, R) of R queries times their rows of the map, which is made in this dtype -> (B, H, N).

    q (B, R, H, D), k (B, N, H, D), lse (B, H, R) or None. The scale is that of attention; it is multiplied into q.
    """
    q = (q * q.shape[-1] ** -0.5).transpose(1, 2)
    logits = (q @ k.permute(0, 2, 3, 1)).to(dtype)
    probs = logits.softmax(-1) if lse is None else logits.sub_(lse.unsqueeze(-1).to(dtype)).exp_()
    return (weights.unsqueeze(-2).to(dtype) @ probs).squeeze(-2)


def times_rows(weights: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, rows: int = 128) -> Tensor:
    """The same with the map in fp32, for a few rows at a time."""
    total = torch.zeros_like(weights)
    for first in range(0, q.shape[1], rows):
        taken = slice(first, first + rows)
        of_rows = None if lse is None else lse[..., taken]
        total += times_map(weights[..., taken], q[:, taken], k, of_rows, torch.float32)
    return total


def operators(problem: Problem) -> dict[str, Rivals]:
    """Operator -> rival -> function."""
    from ffvt.kernels import backend_cpp  # only where it is built

    kernels = backend_cpp.KERNELS
    q, k, v = problem.inputs()[0].unbind(2)
    scale = problem.head_dim**-0.5
    _, row, _, lse, row_max = backend_cpp.attention_stats_forward(q, k, v, scale)
    lse = lse + scale * row_max
    found: dict[str, Rivals] = {
        STATS: {
            WITHOUT_LINES: lambda: kernels.attention_forward(q, k, v, scale),
            OURS: lambda: backend_cpp.attention_stats_forward(q, k, v, scale),
        }
    }

    def widened(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        wide = (t.float() if t.dtype == torch.float16 else t for t in (q, k))
        return function(row, *wide, *arguments)

    for operator, given in ((GIVEN, lse), (RECOMPUTED, None)):
        found[operator] = {
            MAP: partial(widened, times_map, given, torch.float32),
            ROWS: partial(widened, times_rows, given),
            PRODUCTS: lambda: kernels.attention_products(q, k),
            OURS: partial(backend_cpp.attention_vecmat_forward, row, q, k, given, scale),
        }
        if q.dtype != torch.float32:
            found[operator][NARROW_MAP] = partial(widened, times_map, given, q.dtype)
    return found


def check_agreement(found: Mapping[str, Rivals], rel: float) -> None:
    """The gate: the same attention bit by bit, and vectors that agree to `rel`.

    Raises:
        DisagreementError: they do not.
    """
    stats, (out, *_) = found[STATS], found[STATS][WITHOUT_LINES]()
    require_equal(STATS, stats[OURS]()[0], out)
    for operator in (GIVEN, RECOMPUTED):
        ours = found[operator][OURS]()
        for name, rival in found[operator].items():
            if name not in (OURS, PRODUCTS):
                require_close(f"{operator}: {name}", rival().float(), ours, rel)


def measure_problem(problem: Problem, rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """Gate, then a record per operator and rival."""
    found = operators(problem)
    check_agreement(found, GATE_REL[problem.dtype])
    sizes = {name: getattr(problem, name) for name in ("tokens", "heads", "head_dim")}
    common = {"dtype": problem.dtype, "parameters": {"batch_size": problem.batch, **sizes}, "peak_memory_bytes": None}
    for operator, rivals in found.items():
        cases = [Case(name, lambda function=function: function) for name, function in rivals.items()]
        timings = measure(cases, MORE_ROUNDS.get(operator, 1) * rounds, warmup, problem.device)
        against = {baseline: speedups(timings, baseline) for baseline in BASELINES if baseline in rivals}
        for name, timing in timings.items():
            ratios = {baseline: ratio[name] for baseline, ratio in against.items()}
            yield {**common, "mode": operator, "case": name, "time_ms": timing.to_dict(), "speedup": ratios}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per dtype, operator and rival."""
    torch.set_num_threads(arguments.threads)
    common = {**stamp("attention_stats", "cpu"), "served_by": "cpp", "extension": ffvt.info()["extension"]}
    sizes = arguments.batch_size, arguments.tokens, arguments.heads, arguments.head_dim
    return [
        {**common, **record}
        for dtype in arguments.dtypes
        for record in measure_problem(Problem(*sizes, dtype), arguments.rounds, arguments.warmup)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and appends the records."""
    parser = make_parser(__doc__, rounds=20, warmup=2)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=785)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error(f"these are the C++ kernels: --device must be cpu; got {arguments.device}")
    if arguments.quick:
        vars(arguments).update(QUICK)
    records = run(arguments)
    print(render(records))
    save(records, arguments, "attention_stats.jsonl")


if __name__ == "__main__":
    main()
