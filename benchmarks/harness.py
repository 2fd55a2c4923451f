"""What every benchmark shares: interleaved timing, the correctness gate, the environment, flags, JSON lines.

In every round each case runs once, in an order shuffled per round, so that noise of the machine and what one case
leaves behind (heap, caches, clocks) hit all alike. Times are in milliseconds: median, 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import cpu_facts
from ffvt.version import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_SERVED = (ImportError, RuntimeError, ValueError, TypeError)  # what a rival raises where it cannot serve


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


def describe_error(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def stamp(benchmark: str, device: str) -> dict[str, Any]:
    """What every record of a run shares: the benchmark's name, the date, the environment before the run's own load."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "environment": environment(device)}


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: device, CPU, driver, versions, commit, threads, load before the run."""
    is_cuda, cpu = device == "cuda", cpu_facts()
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if is_cuda else cpu["cpu_name"],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        **cpu,
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "ffvt": __version__,
        **{package: _version(package) for package in ("torch", "triton", "timm")},
        "commit": _commit(),
    }


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


def make_parser(description: str | None, rounds: int, warmup: int) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark of rivals has, and these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--warmup", type=int, default=warmup, help="untimed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON lines to append to, in place of those in benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes only where --out says")
    return parser


def save(records: Iterable[Mapping[str, Any]], arguments: argparse.Namespace, name: str) -> None:
    """Appends to --out, or without it to `name` in benchmarks/results; a quick run writes only where --out says."""
    if arguments.out or not arguments.quick:
        append_results(arguments.out or RESULTS / name, records)
