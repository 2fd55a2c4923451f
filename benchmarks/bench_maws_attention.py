"""maws_attention against its rivals: forward, backward and both, selection included.

    python -m benchmarks.bench_maws_attention [--device cpu] [--dtypes fp32 bf16 fp16] [--tokens 197 577 785 1025]
        [--batch_sizes 1 4] [--head_dims 64 80] [--rounds 5] [--threads 2] [--compiled] [--out FILE] [--quick]

Rivals: the authors' eager form; with --compiled torch.compile of it, which takes a minute a shape; "composition", SDPA
with the one row and column and top-k beside it; SDPA alone, which selects nothing; ours. All read one packed
(B, N, 3, H, D) tensor and give one packed gradient. Before a shape is timed the gate compares outputs, gradients and,
in fp32, picks.

forward: without gradients. backward: of a graph that is kept. both: as in training. GFLOP/s counts 4 B H N^2 D for the
forward and 2.5 times that for the backward; the peak beside it is the best of PyTorch's own large matmuls in the same
run, in the dtype (fp16 on a CPU: in fp32, as that is what its products are made in).

Prints a markdown table and appends one JSON line per shape, mode and rival to
benchmarks/results/maws_attention.jsonl. --quick runs one tiny shape; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import ffvt
from benchmarks.attention_rivals import COMPILED, EAGER, OURS, Rival, authors_compiled, authors_eager, composition, ours
from benchmarks.attention_rivals import sdpa as sdpa_rival
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
from benchmarks.report import COMPOSITION, render_attention

SDPA = "SDPA alone"
RIVALS: dict[str, Rival] = {
    EAGER: authors_eager,
    COMPILED: authors_compiled,
    COMPOSITION: composition(None),
    SDPA: sdpa_rival(None),
    OURS: ours(None),
}
MODES = ("forward", "backward", "both")
FORWARDS_OF = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # the work of a mode, in forwards
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATE_REL = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 1e-2}
QUICK = {"batch_sizes": [1], "tokens": [37], "head_dims": [16]}


def random_inputs(shape: tuple[int, int, int, int], dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3, H, D) and the gradient of out (B, N, H, D), the same ones every time."""
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    qkv = 1.5 * torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    grad_out = torch.randn(shape, generator=generator)
    return qkv.to(device, DTYPES[dtype]), grad_out.to(device, DTYPES[dtype])


def workload(rival: Rival, mode: str, qkv: Tensor, grad_out: Tensor, num_select: int) -> Callable[[], object]:
    """The function to time."""
    if mode == "forward":
        return torch.no_grad()(partial(rival, qkv, num_select))
    qkv = qkv.detach().requires_grad_()
    if mode == "backward":
        out = rival(qkv, num_select)[0]
        return lambda: torch.autograd.grad(out, qkv, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(rival(qkv, num_select)[0], qkv, grad_out)


def check_agreement(rivals: dict[str, Rival], qkv: Tensor, grad_out: Tensor, num_select: int, dtype: str) -> None:
    """The gate: outputs and gradients of all rivals agree with ours; in fp32 the picks are equal.

    Raises:
        DisagreementError: they do not.
    """

    def evaluate(rival: Rival) -> tuple[Tensor, Tensor, Tensor | None]:
        leaf = qkv.detach().requires_grad_()
        out, index = rival(leaf, num_select)
        return out.detach().float(), torch.autograd.grad(out, leaf, grad_out)[0].float(), index

    expected = evaluate(rivals[OURS])
    for name, rival in rivals.items():
        found = evaluate(rival)
        require_close(f"out of {name}", found[0], expected[0], GATE_REL[dtype])
        require_close(f"gradient of {name}", found[1], expected[1], GATE_REL[dtype])
        if dtype == "fp32" and found[2] is not None:
            require_equal(f"picks of {name}", found[2], expected[2])


def matmul_peak(dtype: str, device: str) -> float:
    """GFLOP/s of PyTorch's best large matmul."""
    if device == "cpu" and dtype == "fp16":
        dtype = "fp32"
    sizes = (1024, 2048)
    cases = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        cases.append(Case(str(size), partial(partial, torch.mm, a, b)))
    timings = measure(cases, rounds=5, warmup=1, device=device)
    return max(2 * size**3 / min(timings[str(size)].samples) / 1e6 for size in sizes)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per shape, mode and rival."""
    torch.set_num_threads(arguments.threads)
    torch._functorch.config.donated_buffer = False  # a compiled rival's graph is kept, to time its backward alone
    common = {
        "benchmark": "maws_attention",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(arguments.device),
        "served_by": ffvt.info()["devices"][arguments.device]["serves"],
        "extension": ffvt.info()["extension"],
    }
    names = [name for name in RIVALS if name != COMPILED or arguments.compiled]
    records = []
    for dtype in arguments.dtypes:
        peak = matmul_peak(dtype, arguments.device)
        for batch, head_dim, tokens in itertools.product(arguments.batch_sizes, arguments.head_dims, arguments.tokens):
            shape = (batch, tokens, arguments.heads, head_dim)
            fields = {**common, "dtype": dtype, "matmul_gflops": round(peak, 1)}
            fields["parameters"] = {"shape": shape, "num_select": arguments.num_select}
            records += measure_shape(shape, dtype, {name: RIVALS[name] for name in names}, fields, arguments)
            print(render_attention(records[-len(MODES) * len(names) :]).splitlines()[-1], flush=True)
    return records


def measure_shape(
    shape: tuple[int, int, int, int],
    dtype: str,
    rivals: dict[str, Rival],
    fields: dict[str, Any],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The records of one shape."""
    batch, tokens, heads, head_dim = shape
    qkv, grad_out = random_inputs(shape, dtype, arguments.device)
    gate = partial(check_agreement, rivals, qkv, grad_out, arguments.num_select, dtype)
    records = []
    for mode in MODES:
        cases = [
            Case(name, partial(workload, rival, mode, qkv, grad_out, arguments.num_select))
            for name, rival in rivals.items()
        ]
        timings = measure(
            cases, arguments.rounds, arguments.warmup, arguments.device, gate if mode == MODES[0] else None
        )
        flops = FORWARDS_OF[mode] * 4 * batch * heads * tokens**2 * head_dim
        against = {name: speedups(timings, name) for name in rivals if name != OURS}
        records += [
            {
                **fields,
                "mode": mode,
                "case": name,
                "time_ms": timing.to_dict(),
                "gflops": round(flops / timing.median / 1e6, 1),
                "speedup": {baseline: found[name] for baseline, found in against.items()},
            }
            for name, timing in timings.items()
        ]
    return records


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[4, 1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[197, 577, 785, 1025])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 80])
    parser.add_argument("--num_select", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the authors' form too")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; benchmarks/results/maws_attention.jsonl")
    parser.add_argument("--quick", action="store_true", help="one tiny shape; writes only where --out says")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and appends the records."""
    arguments = parse(argv)
    records = run(arguments)
    print("\n" + render_attention(records))
    out = arguments.out or (None if arguments.quick else RESULTS / "maws_attention.jsonl")
    if out is not None:
        append_results(out, records)


if __name__ == "__main__":
    main()
