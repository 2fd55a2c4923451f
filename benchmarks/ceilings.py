"""What a device does at best: large matrix products and a large copy, each measured once a process."""

from __future__ import annotations

from functools import cache, partial

import torch

from benchmarks.harness import Case, measure
from ffvt.precision import dtype_of

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of the matrices
ROUNDS, WARMUP = 5, 1


@cache
def matmul_peak(dtype: str, device: str, sides: tuple[int, ...] = ()) -> float:
    """GFLOP/s of PyTorch's best large matmul; for fp16 on a CPU in fp32, as that is what its products are made in."""
    if device == "cpu" and dtype == "fp16":
        dtype = "fp32"
    sides = sides or SIDES[device]
    cases = []
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype_of(dtype)) for _ in range(2))
        cases.append(Case(str(side), partial(partial, torch.mm, a, b)))
    timings = measure(cases, ROUNDS, WARMUP, device)
    return max(2 * side**3 / min(timings[str(side)].samples) / 1e6 for side in sides)


@cache
def copy_peak(device: str, elements: int) -> float:
    """GB/s of a copy of fp32 elements, bytes read and written."""
    source = torch.randn(elements, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    timing = measure([Case("copy", lambda: copy)], ROUNDS, WARMUP, device)["copy"]
    return 2 * source.nbytes / min(timing.samples) / 1e6
