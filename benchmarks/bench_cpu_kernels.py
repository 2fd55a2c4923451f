"""What the C++ attention makes of a CPU: the operands of its products, and its threads.

    python -m benchmarks.bench_cpu_kernels [--tokens 785] [--head_dim 64] [--rounds 20] [--threads 2] [--out FILE]
        [--quick]

maws_attention forward and backward of 4 x 12 heads and of one alone, with one thread and with --threads: fp32; bf16
multiplied as such, where this CPU does, and widened to fp32; fp16, which is always widened. Before any timing the gate
compares what the dtypes and operands give.

Prints a markdown table and appends one JSON line per heads, mode and case to benchmarks/results/cpu_kernels.jsonl.
--quick runs tiny sizes; it writes only where --out says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Timing, make_parser, measure, require_close, save, stamp
from benchmarks.problem import Problem
from benchmarks.timing_tables import render
from ffvt.kernels import backend_cpp

HEADS = ((4, 12), (1, 1))  # batch, heads
CALLS = {48: 1, 1: 20}  # per sample, by the number of heads
FP32, ONE_THREAD = "fp32 with as many threads", "itself with one thread"
QUICK = {"tokens": 37, "head_dim": 16}


@dataclass(frozen=True)
class Kind:
    """Tensors of a dtype, and the operands of their products."""

    dtype: str
    operands: str

    def __str__(self) -> str:
        return self.dtype if self.dtype == "fp32" else f"{self.dtype}, {self.operands} products"


def kinds() -> list[Kind]:
    """What this CPU can multiply."""
    multiplies = backend_cpp.facts()["product_gflops"]["bf16"] > 0
    narrow = [Kind("bf16", "bf16")] if multiplies else []
    return [Kind("fp32", "fp32"), *narrow, Kind("bf16", "fp32"), Kind("fp16", "fp32")]


class Workload:
    """One kind of one problem on some threads: its forward, its backward."""

    def __init__(self, problem: Problem, operands: str, threads: int) -> None:
        self.problem, self.operands, self.threads = problem, operands, threads
        self.scale = problem.head_dim**-0.5
        torch.manual_seed(0)
        self.qkv = problem.inputs()[0].detach().unbind(2)
        out, _, _, *statistics = self.forward()
        self.saved = (out, *statistics)
        self.grads = tuple(torch.empty_like(out) for _ in range(3))

    def forward(self) -> tuple[torch.Tensor, ...]:
        self._set()
        return backend_cpp.maws_attention_forward(*self.qkv, self.problem.num_select, self.scale, 0)

    def backward(self) -> None:
        self._set()
        backend_cpp.maws_attention_backward(self.saved[0], *self.qkv, *self.saved, self.scale, self.grads)

    def _set(self) -> None:
        torch.set_num_threads(self.threads)
        backend_cpp.force_products(self.operands)


def workloads(
    batch: int, heads: int, tokens: int, head_dim: int, most_threads: int
) -> dict[tuple[Kind, int], Workload]:
    """Every kind with every number of threads."""
    select = min(12, tokens)
    return {
        (kind, threads): Workload(
            Problem(batch, tokens, heads, head_dim, kind.dtype, "cpu", select), kind.operands, threads
        )
        for kind in kinds()
        for threads in sorted({1, most_threads})
    }


def check_agreement(found: dict[tuple[Kind, int], Workload]) -> None:
    """The gate: outputs and gradients are those of fp32, to the dtype's accuracy.

    Raises:
        DisagreementError: they are not.
    """
    results = {}
    for key, workload in found.items():
        workload.backward()
        results[key] = [workload.saved[0].float(), *(grad.float() for grad in workload.grads)]
    expected = results[next(iter(results))]
    for (kind, threads), tensors in results.items():
        for name, mine, theirs in zip(("out", "dq", "dk", "dv"), tensors, expected):
            require_close(f"{name} of {kind} on {threads}", mine, theirs, 1e-4 if kind.dtype == "fp32" else 5e-2)


def measure_heads(found: dict[tuple[Kind, int], Workload], rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """Gate, then a record per mode and case."""
    check_agreement(found)
    problem = next(iter(found.values())).problem
    parameters = {name: getattr(problem, name) for name in ("batch", "heads", "tokens", "head_dim")}
    common = {"dtype": "all dtypes", "parameters": parameters, "peak_memory_bytes": None}
    calls = CALLS.get(problem.batch * problem.heads, 1)
    for mode in ("forward", "backward"):
        cases = [
            Case(f"{kind}, {_threads(threads)}", partial(getattr, workload, mode))
            for (kind, threads), workload in found.items()
        ]
        timings = measure(cases, rounds, warmup, "cpu", calls=calls)
        for (kind, threads), case in zip(found, cases):
            timing = timings[case.name]
            speedup = {
                FP32: _over(timing, timings[f"fp32, {_threads(threads)}"]),
                ONE_THREAD: _over(timing, timings[f"{kind}, {_threads(1)}"]),
            }
            yield {**common, "mode": mode, "case": case.name, "time_ms": timing.to_dict(), "speedup": speedup}


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _over(timing: Timing, baseline: Timing) -> dict[str, float]:
    return {"medians": round(baseline.median / timing.median, 4)}


def run(rounds: int, warmup: int, threads: int, tokens: int, head_dim: int) -> list[dict[str, Any]]:
    """The records of all heads."""
    torch.set_num_threads(threads)
    common = {**stamp("cpu_kernels", "cpu"), "served_by": "cpp", **backend_cpp.facts()}
    try:
        return [
            {**common, **record}
            for batch, heads in HEADS
            for record in measure_heads(workloads(batch, heads, tokens, head_dim, threads), rounds, warmup)
        ]
    finally:
        backend_cpp.force_products("auto")
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and appends the records."""
    parser = make_parser(__doc__, rounds=20, warmup=2)
    parser.add_argument("--tokens", type=int, default=785)
    parser.add_argument("--head_dim", type=int, default=64)
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error(f"--device must be cpu; got {arguments.device}")
    if arguments.quick:
        vars(arguments).update(QUICK)
    records = run(arguments.rounds, arguments.warmup, arguments.threads, arguments.tokens, arguments.head_dim)
    print(render(records))
    save(records, arguments, "cpu_kernels.jsonl")


if __name__ == "__main__":
    main()
