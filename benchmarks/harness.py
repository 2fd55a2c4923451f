"""What every benchmark shares: the environment, interleaved timing, peak memory, the correctness gate, JSON lines.

Times: in every round each case runs once, in an order shuffled per round, so that noise of the machine and what one
case leaves behind (heap, caches, clocks) hit all alike. Reported in milliseconds: median, 20th and 80th percentile.

Peak memory: growth over what is held before the call (weights, optimiser state, inputs), in a pass of its own. On CUDA
the caching allocator's peak. On CPU the system's high-water mark of resident memory (VmHWM), reset before the call:
- not the profiler's peak, which sees tensors only: scratch of oneDNN and of C++ kernels is outside its allocator;
- not `ru_maxrss`, which cannot be reset and which a spawned child inherits from its parent at exec;
- in another process, because malloc is told there to hand every large block straight back to the system: resident
  memory is then live memory, not what the heap happened to keep. That slows it down, so no time is taken there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffvt.version import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU_FLAG_PREFIXES = ("amx", "avx", "fma", "f16c")
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGE_BLOCK = 65536  # bytes


class DisagreementError(RuntimeError):
    """Rivals do not compute the same thing, so their times must not be compared."""


@dataclass(frozen=True)
class Case:
    """One rival: `setup()` builds its state and returns the function to measure.

    For peak memory on CPU `setup` must pickle: a module-level function, a `functools.partial` or a callable dataclass.
    """

    name: str
    setup: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """The samples of one case, one per round, in milliseconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the sorted samples."""
        return torch.tensor(self.samples, dtype=torch.float64).quantile(percent / 100).item()

    def to_dict(self) -> dict[str, Any]:
        numbers = {"median": self.median, "p20": self.percentile(20), "p80": self.percentile(80)}
        rounded = {name: round(value, 5) for name, value in numbers.items()}
        return {**rounded, "n": len(self.samples), "samples": [round(s, 5) for s in self.samples]}


def measure(
    cases: Sequence[Case],
    rounds: int,
    warmup: int,
    device: str,
    gate: Callable[[], object] | None = None,
    calls: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times the cases in interleaved rounds.

    Args:
        cases: the rivals, with distinct names; all are set up before the first is timed.
        rounds, warmup: timed and untimed rounds.
        device: "cpu" (perf_counter) or "cuda" (events).
        gate: runs before anything is set up; it raises if the rivals disagree.
        calls: calls per sample, for functions too short for the clock; a sample is their mean.
        before: runs before each sample, untimed: to empty a cache, say.

    Raises:
        ValueError: two cases of one name, or no round.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names) or rounds < 1:
        raise ValueError(f"measure: names must be distinct and rounds positive; got names={names}, rounds={rounds}")
    if gate is not None:
        gate()
    functions = {case.name: case.setup() for case in cases}
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    elapsed = _elapsed_cuda if device == "cuda" else _elapsed_cpu
    for number in range(-warmup, rounds):
        gc.collect()
        gc.disable()  # Python's collector works between rounds, not inside a sample
        try:
            for name in order.sample(names, len(names)):
                sample = elapsed(functions[name], calls, before) / calls
                if number >= 0:
                    samples[name].append(sample)
        finally:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _elapsed_cpu(function: Callable[[], object], calls: int, before: Callable[[], object] | None) -> float:
    """Milliseconds of all calls, the release of their results included."""
    if before is not None:
        before()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) * 1e3


def _elapsed_cuda(function: Callable[[], object], calls: int, before: Callable[[], object] | None) -> float:
    """Milliseconds of the device. What `before` leaves running there hides the launch of the calls behind it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if before is not None:
        before()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def speedups(timings: Mapping[str, Timing], baseline: str) -> dict[str, dict[str, float]]:
    """How many times faster than `baseline` each case is; below 1 it is slower.

    `medians`: ratio of the medians. `paired`: median over the rounds of the ratio within a round, which noise slower
    than a round cannot move. Far apart, the two say that the run was too noisy.
    """
    base = timings[baseline]
    return {
        name: {
            "medians": round(base.median / timing.median, 4),
            "paired": round(statistics.median(b / t for b, t in zip(base.samples, timing.samples)), 4),
        }
        for name, timing in timings.items()
    }


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


def require_close(what: str, actual: Tensor, expected: Tensor, rel: float) -> None:
    """Gate: the largest difference is at most `rel` of the largest expected magnitude.

    Raises:
        DisagreementError: it is not, the shapes differ, a value is not finite, or all expected values are zero.
    """
    if actual.shape != expected.shape:
        raise DisagreementError(f"{what}: shapes must be equal; got {tuple(actual.shape)}, {tuple(expected.shape)}")
    magnitude = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    if magnitude == 0 or not difference <= rel * magnitude:
        raise DisagreementError(f"{what}: must agree to {rel:g} of {magnitude:.3g}; got difference={difference:.3g}")


def require_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """Gate: equal shapes and values, or DisagreementError."""
    if not torch.equal(actual, expected):
        raise DisagreementError(f"{what}: must be equal; got {actual.tolist()} and {expected.tolist()}")


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: device, CPU flags, driver, versions, commit, threads, load before the run."""
    is_cuda = device == "cuda"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "cpu_name": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_flags": _cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "ffvt": __version__,
        **{package: _version(package) for package in ("torch", "triton", "timm")},
        "commit": _commit(),
    }


def _cpuinfo(field: str) -> str:
    """One field of the first processor in /proc/cpuinfo, "" where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return sorted(flag for flag in flags if flag.startswith(CPU_FLAG_PREFIXES))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The short commit of this checkout, "+dirty" where files other than results differ from it."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}+dirty" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def append_results(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON line per record; makes the folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
