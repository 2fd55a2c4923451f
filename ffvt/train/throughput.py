"""Images per second of a run, and operations per second of a machine's matrix products."""

from __future__ import annotations

import time

import torch

SLOW_PRODUCT = 0.02  # seconds


class Throughput:
    """Counts images against the clock."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: the time that evaluations take is not the trainer's."""
        self.since, self.images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """Adds images, of all ranks together."""
        self.images += images

    def take(self) -> float:
        """Images per second since the last restart; restarts."""
        rate = self.images / (time.perf_counter() - self.since)
        self.restart()
        return rate


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on this device: the best of a few, in well under a second."""
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random numbers stay as they are
    for side in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a = torch.randn(side, side, device=device, generator=generator).to(dtype)  # constants would flatter a GPU
        seconds = min(_seconds_of_product(a, a) for _ in range(5))
        best = max(best, 2 * side**3 / seconds)
        if seconds > SLOW_PRODUCT:  # a CPU without instructions for this type: the next side would take 8 times as long
            break
    return best


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait_for(a.device)
    start = time.perf_counter()
    a @ b
    _wait_for(a.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
