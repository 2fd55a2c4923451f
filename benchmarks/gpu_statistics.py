"""attention_stats and attention_vecmat in Triton, against the attention alone and against the map in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_rivals import OURS
from benchmarks.cuda_timing import FORMS, measure_form, prepare
from benchmarks.harness import require_close, speedups
from benchmarks.problem import Problem

ATTENTION, MAP, WITHOUT_LSE = "attention alone", "map in PyTorch", "ours, lse not given"
CALLS = {"cpu": 1, "cuda": 4}  # per sample
GATE_REL = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # PyTorch's logits of 16 bits are rounded; ours never are

Rivals = dict[str, Callable[[], Any]]


def times_map(weights: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """weights (B, H, N) times the softmax map, made by a product in the dtype of q, k (B, N, H, D): (B, H, N) fp32."""
    logits = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (weights.unsqueeze(-2) @ logits.softmax(-1, dtype=torch.float32)).squeeze(-2)


def operators(problem: Problem) -> dict[str, Rivals]:
    """Operator -> rival -> function; the first rival is the baseline."""
    from ffvt.kernels import backend_triton, maws_attention_triton  # only where Triton is

    q, k, v = problem.inputs()[0].unbind(2)
    scale = problem.head_dim**-0.5
    _, row, _, lse, _ = backend_triton.attention_stats_forward(q, k, v, scale)
    vecmat = partial(backend_triton.attention_vecmat_forward, row, q, k)
    return {
        "attention_stats": {
            ATTENTION: partial(maws_attention_triton.attend, q, k, v, scale),
            OURS: partial(backend_triton.attention_stats_forward, q, k, v, scale),
        },
        "attention_vecmat": {
            MAP: partial(times_map, row, q, k, scale),
            OURS: partial(vecmat, lse, scale),
            WITHOUT_LSE: partial(vecmat, None, scale),
        },
    }


def measure_problem(problem: Problem, rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """Gate, then a record per operator, form of launch and rival: its `time_ms`, or in `missing` why it has none."""
    found = operators(problem)
    vecmat = found["attention_vecmat"]
    for name in (OURS, WITHOUT_LSE):
        require_close(f"attention_vecmat: {name}", vecmat[name](), vecmat[MAP](), GATE_REL[problem.dtype])
    sizes = {name: getattr(problem, name) for name in ("tokens", "heads", "head_dim")}
    common = {"dtype": problem.dtype, "parameters": {"batch_size": problem.batch, **sizes}, "peak_memory_bytes": None}
    for operator, rivals in found.items():
        for form in FORMS[problem.device]:
            if form.l2 == "cold":
                continue  # these operators read what was just written
            how = {**common, "mode": operator, **form._asdict()}
            setups = {name: lambda function=function: function for name, function in rivals.items()}
            functions, refused = prepare(setups, form)
            yield from ({**how, "case": name, "missing": reason} for name, reason in refused.items())
            timings = measure_form(functions, form, problem.device, rounds, warmup, CALLS[problem.device])
            baseline = next(iter(rivals))
            against = speedups(timings, baseline)
            for name, timing in timings.items():
                yield {**how, "case": name, "time_ms": timing.to_dict(), "speedup": {baseline: against[name]}}
