"""Peak memory of a call: growth over what is held before it (weights, optimiser state, inputs), in a pass of its own.

On CUDA the caching allocator's peak. On CPU the system's high-water mark of resident memory (VmHWM), reset before the
call:
- not the profiler's peak, which sees tensors only: scratch of oneDNN and of C++ kernels is outside its allocator;
- not `ru_maxrss`, which cannot be reset and which a spawned child inherits from its parent at exec;
- in another process, because malloc is told there to hand every large block straight back to the system: resident
  memory is then live memory, not what the heap happened to keep. That slows it down, so no time is taken there.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import Case

MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGE_BLOCK = 65536  # bytes


def peak_memory(cases: Sequence[Case], device: str) -> list[int | None]:
    """Bytes by which one call of each case, after a warming one, grows memory; None where it cannot be measured."""
    if device == "cuda":
        return [_cuda_peak(case) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return [pool.submit(_resident_peak, case).result() for case in cases]


def _cuda_peak(case: Case) -> int:
    function = case.setup()
    function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _resident_peak(case: Case) -> int | None:
    _reset_high_water()  # also before the set-up, which allocates what is held
    function = case.setup()
    function()
    gc.collect()
    if not _reset_high_water():
        return None
    held = _resident_bytes("VmRSS")
    function()
    return max(0, _resident_bytes("VmHWM") - held)


def _reset_high_water() -> bool:
    """Hands freed memory back and starts VmHWM again from VmRSS; False where this is not Linux with glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MALLOPT_TRIM_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(MALLOPT_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
