"""maws_attention against its rivals: forward, backward and both, selection included.

    python -m benchmarks.bench_maws_attention [--device cpu] [--dtypes fp32 bf16 fp16] [--tokens 197 577 785 1025]
        [--batch_sizes 1 4] [--head_dims 64 80] [--rounds 5] [--threads 2] [--compiled] [--out FILE] [--quick]

Rivals: the authors' eager form; with --compiled torch.compile of it, which takes a minute a shape; "composition", SDPA
with the one row and column and top-k beside it; SDPA alone, which selects nothing; ours. On a GPU each of SDPA's
backends is a rival of its own, and flash-attn and xformers are rivals where they are installed. All read one packed
(B, N, 3, H, D) tensor and give one packed gradient. Before a shape is timed the gate compares outputs, gradients and,
in fp32, picks.

forward: without gradients. backward: of a graph that is kept. both: as in training. On a GPU each is launched from
Python and replayed from a CUDA graph, the latter with a hot and with a cold L2 cache. GFLOP/s counts 4 B H N^2 D for
the forward and 2.5 times that for the backward; the peak beside it is the best of PyTorch's own large matmuls in the
same run, in the dtype (fp16 on a CPU: in fp32, as that is what its products are made in).

Prints a markdown table and appends one JSON line per shape, mode and rival to
benchmarks/results/maws_attention.jsonl. --quick runs one tiny shape; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ffvt
from benchmarks.attention_rivals import COMPILED, OURS, RIVALS, Rival
from benchmarks.ceilings import matmul_peak
from benchmarks.cuda_timing import FORMS, measure_form, prepare
from benchmarks.harness import (
    NOT_SERVED,
    DisagreementError,
    Timing,
    describe_error,
    make_parser,
    require_close,
    require_equal,
    save,
    speedups,
    stamp,
)
from benchmarks.problem import Problem
from benchmarks.timing_tables import render_attention
from ffvt.precision import PRECISIONS

FORWARDS_OF = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # the work of a mode, in forwards
MODES = tuple(FORWARDS_OF)
GATE_REL = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 1e-2}
CALLS = {"cpu": 1, "cuda": 4}  # per sample
QUICK = {"batch_sizes": [1], "tokens": [37], "head_dims": [16]}

Record = dict[str, Any]


def workload(rival: Rival, mode: str, qkv: Tensor, grad_out: Tensor, num_select: int) -> Callable[[], object]:
    """The function to time."""
    if mode == "forward":
        return torch.no_grad()(partial(rival, qkv, num_select))
    qkv = qkv.detach().requires_grad_()
    if mode == "backward":
        out = rival(qkv, num_select)[0]
        return lambda: torch.autograd.grad(out, qkv, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(rival(qkv, num_select)[0], qkv, grad_out)


def measure_problem(
    problem: Problem, rivals: Mapping[str, Rival], rounds: int, warmup: int, sides: tuple[int, ...] = ()
) -> Iterator[Record]:
    """Gate, then times: a record per mode, form of launch and rival, as soon as they are known.

    A record has `time_ms`; or `missing`, why its rival has no time; or `failed`: the rival disagrees with ours, or ours
    cannot run.

    Args:
        problem: what to compute.
        rivals: by name; ours is among them.
        rounds, warmup: as in `harness.measure`.
        sides: as in `ceilings.matmul_peak`.
    """
    common = {"dtype": problem.dtype, "parameters": {"shape": problem.shape, "num_select": problem.num_select}}
    qkv, grad_out = problem.inputs()
    agreeing, refusals = gate(problem, rivals, qkv, grad_out)
    yield from ({**common, **refusal} for refusal in refusals)
    common["matmul_gflops"] = round(matmul_peak(problem.dtype, problem.device, sides), 1)
    for mode, form in itertools.product(MODES, FORMS[problem.device]):
        how = {**common, "mode": mode, **form._asdict()}
        setups = {
            name: partial(workload, rival, mode, qkv, grad_out, problem.num_select) for name, rival in agreeing.items()
        }
        functions, refused = prepare(setups, form)
        for name, reason in refused.items():
            yield {**how, "case": name, "failed" if name == OURS else "missing": reason}
        if OURS in functions:
            timings = measure_form(functions, form, problem.device, rounds, warmup, CALLS[problem.device])
            work = FORWARDS_OF[mode] * problem.forward_flops
            yield from ({**how, **line} for line in timing_fields(timings, work))
        del functions  # and with them the memory of their graphs


def gate(
    problem: Problem, rivals: Mapping[str, Rival], qkv: Tensor, grad_out: Tensor
) -> tuple[dict[str, Rival], list[Record]]:
    """The rivals whose output and gradient, in fp32 also picks, are ours; and for each of the others why not.

    In 16 bits picks are left to the tests: they may differ where scores are closer than the rounding of the authors'
    maps.
    """

    def evaluate(rival: Rival) -> tuple[Tensor, Tensor, Tensor | None]:
        leaf = qkv.detach().requires_grad_()
        out, index = rival(leaf, problem.num_select)
        return out.detach().float(), torch.autograd.grad(out, leaf, grad_out)[0].float(), index

    expected = evaluate(rivals[OURS])
    agreeing, refusals = {}, []
    for name, rival in rivals.items():
        try:
            out, gradient, index = evaluate(rival)
            require_close(f"out of {name}", out, expected[0], GATE_REL[problem.dtype])
            require_close(f"gradient of {name}", gradient, expected[1], GATE_REL[problem.dtype])
            if problem.dtype == "fp32" and index is not None:
                require_equal(f"picks of {name}", index, expected[2])
            agreeing[name] = rival
        except DisagreementError as error:
            refusals.append({"case": name, "failed": str(error)})
        except NOT_SERVED as error:
            refusals.append({"case": name, "missing": describe_error(error)})
    return agreeing, refusals


def timing_fields(timings: Mapping[str, Timing], flops: float) -> list[Record]:
    """One mode's numbers, a dict per rival."""
    against = {name: speedups(timings, name) for name in timings if name != OURS}
    return [
        {
            "case": name,
            "time_ms": timing.to_dict(),
            "gflops": round(flops / timing.median / 1e6, 4),
            "speedup": {baseline: found[name] for baseline, found in against.items()},
        }
        for name, timing in timings.items()
    ]


def run(arguments: argparse.Namespace) -> list[Record]:
    """The records of all shapes.

    Raises:
        DisagreementError: a rival disagrees with ours, or ours cannot run.
    """
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    common = {
        **stamp("maws_attention", device),
        "served_by": ffvt.info()["devices"][device]["serves"],
        "extension": ffvt.info()["extension"],
    }
    rivals = {name: rival for name, rival in RIVALS[device].items() if name != COMPILED or arguments.compiled}
    records = []
    for dtype, batch, head_dim, tokens in itertools.product(
        arguments.dtypes, arguments.batch_sizes, arguments.head_dims, arguments.tokens
    ):
        problem = Problem(batch, tokens, arguments.heads, head_dim, dtype, device, arguments.num_select)
        found = []
        for record in measure_problem(problem, rivals, arguments.rounds, arguments.warmup):
            if "failed" in record:
                raise DisagreementError(f"{problem}: {record['failed']}")
            found.append({**common, **record})
        print(render_attention(found).splitlines()[-1], flush=True)
        records += found
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and appends the records."""
    parser = make_parser(__doc__, rounds=5, warmup=1)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[4, 1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[197, 577, 785, 1025])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 80])
    parser.add_argument("--num_select", type=int, default=12)
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the authors' form too")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK)
    records = run(arguments)
    print("\n" + render_attention(records))
    save(records, arguments, "maws_attention.jsonl")


if __name__ == "__main__":
    main()
