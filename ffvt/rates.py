"""How fast this machine multiplies matrices in each precision, and which precision therefore trains fastest.

No rule of thumb tells: on some CPUs products in bf16 run at half the rate of fp32, on others at twice, with AMX at
more. Importing this does not import torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from ffvt.precision import PRECISIONS, dtype_of

if TYPE_CHECKING:
    import torch

ROWS, SIDE = 512, 768  # on a CPU: so many tokens times the weights of a linear layer of ViT-B
GPU_SIDE = 8192  # on a GPU rows too: what launches cost does not count then
FEW_ROWS = 16  # of the first products of a dtype
HOPELESS = 8  # times slower than fp32 in those, such as fp16 on many CPUs: larger ones would take seconds
ROUNDS, SECONDS = 3, 0.03  # at least so many rounds, and more as long as they took less

WORTH = 1.2  # times fp32's rate: below it, casting weights and activations in every step eats the gain
TIE = 1.05  # times bf16's rate


def matmul_rates(device: torch.device | str) -> dict[str, float]:
    """FLOP/s of matrix products in each precision, with the threads of this process; well under a second.

    The best of a few rounds, in which the precisions take turns. Measured once per process, device, number of threads
    and permission for TF32. A precision that the device cannot multiply is left out; one that small products show to be
    many times slower than fp32 has the rate of these.
    """
    import torch

    return dict(_measured(torch.device(device), torch.get_num_threads(), torch.get_float32_matmul_precision()))


@cache
def _measured(device: torch.device, _threads: int, _fp32: str) -> dict[str, float]:
    import torch

    rows, side = (GPU_SIDE, GPU_SIDE) if device.type == "cuda" else (ROWS, SIDE)
    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random numbers stay as they are
    random = torch.randn(side, side, device=device, generator=generator)  # constants would flatter a GPU
    rates, matrices = {}, {}
    for name in PRECISIONS:
        matrices[name] = random.to(dtype_of(name))
        try:
            rates[name] = _rate(min(_seconds(matrices[name], FEW_ROWS) for _ in range(ROUNDS)), FEW_ROWS, side)
        except RuntimeError:  # of a device that has no such products
            if name == "fp32":
                raise
    best = {name: math.inf for name, rate in rates.items() if rate * HOPELESS > rates["fp32"]}  # seconds
    rounds, start = 0, time.perf_counter()
    while rounds < ROUNDS or time.perf_counter() - start < SECONDS:
        best = {name: min(seconds, _seconds(matrices[name], rows)) for name, seconds in best.items()}
        rounds += 1
    return rates | {name: _rate(seconds, rows, side) for name, seconds in best.items()}


def _rate(seconds: float, rows: int, side: int) -> float:
    return 2 * rows * side**2 / seconds


def _seconds(matrix: torch.Tensor, rows: int) -> float:
    """The time of one product of the first rows of a square matrix and the matrix."""
    import torch

    left = matrix[:rows]
    _wait_for(matrix.device)
    start = time.perf_counter()
    torch.mm(left, matrix)
    _wait_for(matrix.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest_precision(rates: Mapping[str, float], device: str, fsdp: bool = False) -> str:
    """The precision that trains fastest at these rates of matrix products.

    fp32, unless another is `WORTH` times as fast. Never fp16 on a CPU: it needs its loss scaled, and skips steps. On a
    GPU fp16 only where it beats bf16 by more than a `TIE`: bf16 has fp32's range, so it needs none of that.

    Args:
        rates: FLOP/s by precision, of `matmul_rates`.
        device: "cpu" or "cuda".
        fsdp: whether the model is sharded, which fp16 is not trained with.
    """
    bf16 = rates.get("bf16", 0.0)
    fp16 = rates.get("fp16", 0.0) if device == "cuda" and not fsdp else 0.0
    name, rate = ("fp16", fp16) if fp16 > TIE * bf16 else ("bf16", bf16)
    return name if rate >= WORTH * rates["fp32"] else "fp32"


def rates_text(rates: Mapping[str, float]) -> str:
    """The rates for people: "fp32 160, bf16 84, fp16 158 GFLOP/s"."""
    unit, name = (1e12, "TFLOP/s") if max(rates.values()) >= 1e13 else (1e9, "GFLOP/s")
    shown = {precision: rate / unit for precision, rate in rates.items()}
    return (
        ", ".join(f"{key} {f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'}" for key, rate in shown.items())
        + f" {name}"
    )


def rates_line(rates: Mapping[str, float], device: str, fsdp: bool) -> str:
    """The rates for people, and which precision they favour. device, fsdp: as for `fastest_precision`."""
    return f"products: {rates_text(rates)}; {fastest_precision(rates, device, fsdp)} trains fastest here"
