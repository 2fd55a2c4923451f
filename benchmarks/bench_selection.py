"""maws_select, gather_tokens and its gradient against the same operators of PyTorch.

    python -m benchmarks.bench_selection [--dtypes fp32 bf16] [--batch_size 4] [--tokens 785] [--heads 12]
        [--head_dim 64] [--num_select 12] [--rounds 20] [--threads 2] [--device cpu] [--out FILE]

Rivals: the `torch` backend (elementwise products, softmaxes, topk; gather; zero fill and index_put); ours as it comes.
The gathered tokens have heads * head_dim channels. Before any timing the gate compares results: scores to 1e-5, rows
and gradients exactly. Prints a markdown table and appends one JSON line per dtype, operator and rival to
benchmarks/results/selection.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ffvt
from benchmarks.harness import (
    RESULTS,
    Case,
    append_results,
    environment,
    measure,
    require_close,
    require_equal,
    speedups,
)
from benchmarks.report import OURS, render

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PYTORCH = "PyTorch operators"
BACKENDS = {PYTORCH: "torch", OURS: ""}
CALLS = 20  # per sample: these operators are short


def operators(arguments: argparse.Namespace, dtype: str) -> dict[str, Callable[[str], Any]]:
    """Name -> function of a rival's name."""
    batch, tokens, heads, head_dim = (getattr(arguments, n) for n in ("batch_size", "tokens", "heads", "head_dim"))
    torch.manual_seed(0)
    q, k, _ = torch.randn(batch, tokens, 3, heads, head_dim, device=arguments.device).to(DTYPES[dtype]).unbind(2)
    x = torch.randn(batch, tokens, heads * head_dim, device=arguments.device).to(DTYPES[dtype])
    index = torch.stack([torch.randperm(tokens)[: arguments.num_select] for _ in range(batch)]).to(arguments.device)
    grad = torch.randn(batch, arguments.num_select, heads * head_dim, device=arguments.device).to(DTYPES[dtype])

    def under(rival: str, function: Callable, *inputs: Any) -> Any:
        with ffvt.use_backend(BACKENDS[rival]) if BACKENDS[rival] else nullcontext():
            return function(*inputs)

    def backward(rival: str) -> Any:
        return torch.ops.ffvt.gather_tokens_backward(grad, index, tokens, BACKENDS[rival])

    return {
        "maws_select": lambda rival: under(rival, ffvt.maws_select, q, k, arguments.num_select),
        "gather_tokens": lambda rival: under(rival, ffvt.gather_tokens, x, index),
        "its gradient": backward,
    }


def check_agreement(functions: dict[str, Callable[[str], Any]]) -> None:
    """The gate."""
    select, *exact = functions.values()
    require_close("scores", select(OURS)[1], select(PYTORCH)[1], 1e-5)
    for function in exact:
        require_equal("rows", function(OURS), function(PYTORCH))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per dtype, operator and rival."""
    torch.set_num_threads(arguments.threads)
    common = {
        "benchmark": "selection",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(arguments.device),
        "served_by": ffvt.info()["devices"][arguments.device]["serves"],
        "parameters": {n: getattr(arguments, n) for n in ("batch_size", "tokens", "heads", "head_dim", "num_select")},
        "peak_memory_bytes": None,
    }
    records = []
    for dtype in arguments.dtypes:
        functions = operators(arguments, dtype)
        check_agreement(functions)
        for operator, function in functions.items():
            cases = [Case(name, partial(partial, function, name)) for name in BACKENDS]
            timings = measure(cases, arguments.rounds, 2, arguments.device, calls=CALLS)
            against = speedups(timings, PYTORCH)
            records += [
                {
                    **common,
                    "dtype": dtype,
                    "mode": operator,
                    "case": name,
                    "time_ms": timing.to_dict(),
                    "speedup": {PYTORCH: against[name]},
                }
                for name, timing in timings.items()
            ]
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and appends the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=785)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--num_select", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "selection.jsonl")
    arguments = parser.parse_args(argv)
    records = run(arguments)
    print(render(records))
    append_results(arguments.out, records)


if __name__ == "__main__":
    main()
