"""Rows of `tuning` that do not ship, one table at a time, against the ones that do: D = 64, hot, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.attention_rivals import ours
from benchmarks.bench_maws_attention import FORWARDS_OF, workload
from benchmarks.cuda_timing import EAGER, GRAPH, Setup, measure_form, prepare
from benchmarks.problem import Problem
from ffvt.kernels import tuning

SHIPPED = "shipped"
VARIANTS = {  # by kernel: BLOCK_M, BLOCK_N, warps, stages
    "forward": [
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3)),
        *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    ],
    "query_gradient": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 32, 4, 3)],
    "key_gradient": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2)],
}
CALLS = 4  # per sample


def measure_variants(
    problem: Problem, kernel: str, rounds: int, warmup: int, count: int | None = None
) -> Iterator[dict[str, Any]]:
    """A record per row of one kernel's variants: its `time_ms`, or in `missing` why it has none.

    Args:
        problem: what to compute.
        kernel: a table of `tuning`.
        rounds, warmup: as in `harness.measure`.
        count: variants to measure; None: all.
    """
    mode = "forward" if kernel == "forward" else "backward"
    form = GRAPH if problem.device == "cuda" else EAGER
    qkv, grad_out = problem.inputs()
    setup = partial(workload, ours("triton"), mode, qkv, grad_out, problem.num_select)
    shipped = tuning.find_tiling(kernel, tuning.architecture(qkv.device), qkv.element_size(), problem.head_dim)
    setups: dict[str, Setup] = {SHIPPED: setup}
    for block_m, block_n, warps, stages in VARIANTS[kernel][:count]:
        row = shipped._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        name = f"{block_m}x{block_n}, {warps} warps, {stages} stages"
        setups[name] = partial(under_row, kernel, row._replace(architectures=tuning.ANY), setup)
    # a compiler may refuse a row in many ways: a fact to report
    functions, refused = prepare(setups, form, refusals=(Exception,))
    timings = measure_form(functions, form, problem.device, rounds, warmup, CALLS)
    fields = {"parameters": {"shape": problem.shape}, "dtype": problem.dtype, "kernel": kernel, "mode": mode}
    for name, timing in timings.items():
        gflops = round(FORWARDS_OF[mode] * problem.forward_flops / timing.median / 1e6, 4)
        yield {**fields, "case": name, "time_ms": timing.to_dict(), "gflops": gflops}
    yield from ({**fields, "case": name, "missing": reason} for name, reason in refused.items())


def under_row(kernel: str, row: tuning.Tiling, setup: Setup) -> Callable[[], object]:
    """The function that `setup` makes, with `row` as the kernel's table in the set-up and in every call."""
    with tuning.override(kernel, row):
        function = setup()

    def call() -> object:
        with tuning.override(kernel, row):
            return function()

    return call
