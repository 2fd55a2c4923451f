"""maws_select, gather_tokens and its gradient against the same operators of PyTorch.

    python -m benchmarks.bench_selection [--dtypes fp32 bf16] [--batch_size 4] [--tokens 785] [--heads 12]
        [--head_dim 64] [--num_select 12] [--rounds 20] [--threads 2] [--device cpu] [--out FILE] [--quick]

Rivals: the `torch` backend (elementwise products, softmaxes, topk; gather; zero fill and index_put); ours as it comes.
On a GPU also flash-colreduce where it is installed, which gives sums of all columns and nothing else, and the kernel
that picks from a row and a column, against the chain of operators that PyTorch's users write. The gathered tokens have
heads * head_dim channels. Before any timing the gate compares results: scores to 1e-5, rows and gradients exactly.

Prints a markdown table and appends one JSON line per dtype, operator and rival to benchmarks/results/selection.jsonl.
--quick runs one tiny size; it writes only where --out says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import ffvt
from benchmarks.attention_rivals import OURS, flash_colreduce
from benchmarks.cuda_timing import FORMS, measure_form, prepare
from benchmarks.harness import make_parser, require_close, require_equal, save, speedups, stamp
from benchmarks.problem import Problem
from benchmarks.timing_tables import render
from ffvt.kernels import backend_torch
from ffvt.precision import PRECISIONS

PYTORCH, COLREDUCE = "PyTorch operators", "flash-colreduce, columns alone"
CALLS = {"cpu": 20, "cuda": 4}  # per sample: these operators are short
QUICK = {"batch_size": 1, "tokens": 37, "heads": 2, "head_dim": 16, "num_select": 5}

Rivals = dict[str, Callable[[], Any]]


def operators(problem: Problem, ours: str = "") -> dict[str, Rivals]:
    """Operator -> rival -> function. ours: the backend to force for ours; "" leaves the choice to the device."""
    torch.manual_seed(0)
    q, k, _ = problem.inputs()[0].unbind(2)
    channels = problem.heads * problem.head_dim
    x = torch.randn(problem.batch, problem.tokens, channels, device=problem.device).to(q.dtype)
    order = [torch.randperm(problem.tokens, device=problem.device) for _ in range(problem.batch)]
    index = torch.stack(order)[:, : problem.num_select].contiguous()
    grad = torch.randn(*index.shape, channels, device=problem.device).to(q.dtype)
    backends = {PYTORCH: "torch", OURS: ours}

    def of_backends(function: Callable[[str], Any]) -> Rivals:
        return {name: partial(function, backend) for name, backend in backends.items()}

    def select(backend: str) -> tuple[Tensor, Tensor]:
        with forced(backend):
            return ffvt.maws_select(q, k, problem.num_select)

    def gather(backend: str) -> Tensor:
        with forced(backend):
            return ffvt.gather_tokens(x, index)

    def scatter(backend: str) -> Tensor:
        return torch.ops.ffvt.gather_tokens_backward(grad, index, problem.tokens, backend)

    found = {
        "maws_select": of_backends(select),
        "gather_tokens": of_backends(gather),
        "its gradient": of_backends(scatter),
    }
    if ours == "triton" or problem.device == "cuda":
        found["pick from row and column"] = picks(q, k, problem.num_select)
    if problem.device == "cuda" and find_spec("flash_colreduce") is not None:
        found["maws_select"][COLREDUCE] = partial(flash_colreduce, q, k)
    return found


def forced(backend: str) -> AbstractContextManager:
    return ffvt.use_backend(backend) if backend else nullcontext()


def picks(q: Tensor, k: Tensor, num_select: int) -> Rivals:
    """The last step of maws_select alone, from the logits of the class token's row and column."""
    from ffvt.kernels.maws_select_triton import pick  # only where Triton is

    row, column = (line.contiguous() for line in backend_torch.class_logits(q, k, q.shape[-1] ** -0.5))

    def chain() -> tuple[Tensor, Tensor]:
        score = row.softmax(-1).mean(1) * column.softmax(-1).mean(1)
        return score.topk(num_select).indices, score

    return {PYTORCH: chain, OURS: partial(pick, row, column, num_select, 0)}


def check_agreement(found: Mapping[str, Rivals]) -> None:
    """The gate: scores agree, and rows and gradients are equal.

    Raises:
        DisagreementError: they do not.
    """
    for operator, rivals in found.items():
        ours, theirs = rivals[OURS](), rivals[PYTORCH]()
        if isinstance(ours, tuple):  # index and score
            require_close(f"scores of {operator}", ours[1], theirs[1], 1e-5)
        else:
            require_equal(operator, ours, theirs)


def measure_problem(problem: Problem, rounds: int, warmup: int, ours: str = "") -> Iterator[dict[str, Any]]:
    """Gate, then a record per operator, form of launch and rival: its `time_ms`, or in `missing` why it has none."""
    found = operators(problem, ours)
    check_agreement(found)
    sizes = {name: getattr(problem, name) for name in ("tokens", "heads", "head_dim", "num_select")}
    common = {"dtype": problem.dtype, "parameters": {"batch_size": problem.batch, **sizes}, "peak_memory_bytes": None}
    for operator, rivals in found.items():
        for form in FORMS[problem.device]:
            if form.l2 == "cold":
                continue  # what these operators read was written by the kernel before
            how = {**common, "mode": operator, **form._asdict()}
            setups = {name: lambda function=function: function for name, function in rivals.items()}
            functions, refused = prepare(setups, form)
            yield from ({**how, "case": name, "missing": reason} for name, reason in refused.items())
            timings = measure_form(functions, form, problem.device, rounds, warmup, CALLS[problem.device])
            against = speedups(timings, PYTORCH)
            for name, timing in timings.items():
                yield {**how, "case": name, "time_ms": timing.to_dict(), "speedup": {PYTORCH: against[name]}}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per dtype, operator and rival."""
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    common = {**stamp("selection", device), "served_by": ffvt.info()["devices"][device]["serves"]}
    sizes = arguments.batch_size, arguments.tokens, arguments.heads, arguments.head_dim
    return [
        {**common, **record}
        for dtype in arguments.dtypes
        for record in measure_problem(
            Problem(*sizes, dtype, device, arguments.num_select), arguments.rounds, arguments.warmup
        )
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and appends the records."""
    parser = make_parser(__doc__, rounds=20, warmup=2)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=785)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--num_select", type=int, default=12)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK)
    records = run(arguments)
    print(render(records))
    save(records, arguments, "selection.jsonl")


if __name__ == "__main__":
    main()
