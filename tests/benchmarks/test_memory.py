"""Peak memory is that of a call, not of what is held."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.harness import Case
from benchmarks.memory import peak_memory

MIB = 1024**2


def allocate(held: torch.Tensor, mib: int) -> None:
    scratch = torch.ones(mib * MIB, dtype=torch.uint8)
    del scratch
    assert held.numel() > 0


def setup_allocation(held_mib: int, mib: int) -> Callable[[], None]:
    return partial(allocate, torch.ones(held_mib * MIB, dtype=torch.uint8), mib)


def test_peak_memory_counts_what_a_call_allocates_and_not_what_is_held() -> None:
    """Large, then small, then one held block: neither an earlier case nor the set-up shows in the numbers."""
    cases = [Case("large", partial(setup_allocation, 1, 96)), Case("held", partial(setup_allocation, 64, 32))]
    peaks = peak_memory(cases, "cpu")
    if None in peaks:
        pytest.skip("resident memory cannot be measured on this system")
    assert peaks[0] == pytest.approx(96 * MIB, abs=4 * MIB)
    assert peaks[1] == pytest.approx(32 * MIB, abs=4 * MIB)
