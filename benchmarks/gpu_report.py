"""Everything that a GPU has to prove, in one command: tests, error ratios, ceilings, kernels, variants, whole model.

    python -m benchmarks.gpu_report --out DIR [--minutes 8.5] [--sections tests attention ...]
    TRITON_INTERPRET=1 python -m benchmarks.gpu_report --out DIR --dry_run      tiny sizes on the CPU, to try the script

Runs from a source tree alone. The sections call the benchmarks of this folder; every record is appended to
DIR/gpu.jsonl as soon as it is measured, so what was measured stays if time runs out: past the limit no shape is begun,
and those left out are named. The summary comes last, on the screen and in DIR/summary.md.

Times are of the device (CUDA events), interleaved over the rivals, medians with p20-p80, in the forms of launch that
`cuda_timing` names. FLOP/s count useful operations, 4 B H N^2 D forward and 2.5 times that backward, never padding.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ffvt
from benchmarks import (
    accuracy,
    bench_maws_attention,
    bench_model,
    bench_selection,
    gpu_statistics,
    tuning_variants,
)
from benchmarks.attention_rivals import COMPILED, EAGER, OURS, RIVALS
from benchmarks.ceilings import copy_peak, matmul_peak
from benchmarks.gpu_summary import of, summary
from benchmarks.harness import ROOT, append_results, describe_error, stamp
from benchmarks.model_rivals import OURS_PLAIN, TIMM
from benchmarks.outcome_tables import render_error_ratios
from benchmarks.problem import Problem
from ffvt.model.config import make_config

HEADS = {64: 12, 80: 16, 128: 8}  # by head dimension: those of ViT-B, ViT-H, and a wide head
TESTS_SECONDS = 300  # past it the tests count as failed, and the rest of the time is left to the measurements
COMPILED_PROBLEM = Problem(8, 785, 12, 64, "bf16", "cuda")  # compiling takes time that other shapes need
TINY = Problem(1, 19, 2, 64, "fp16", "cpu")  # of the dry run
COPIED = 2**28  # elements


@dataclass
class Report:
    """Where results go, and how much time is left.

    Attributes:
        out: the folder of gpu.jsonl, tests.log and summary.md.
        device: "cuda", or "cpu" in the dry run.
        deadline: of time.monotonic(); past it nothing is begun.
        records: what was measured.
        left_out: names of what was not begun.
        failures: what went wrong.
    """

    out: Path
    device: str
    deadline: float
    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dry_run = self.device == "cpu"
        self.rounds, self.warmup = (1, 0) if self.dry_run else (15, 2)
        self.sides = (64,) if self.dry_run else ()  # of the ceilings' matrices; () is their own choice
        self.stamp = stamp("gpu", self.device)

    def add(self, section: str, **fields: Any) -> None:
        """Keeps a record and appends it to the file; one that says `failed` is a failure of the report."""
        record = {**self.stamp, "benchmark": f"gpu_{section}", **fields}
        self.records.append(record)
        append_results(self.out / "gpu.jsonl", [record])
        if "failed" in fields:
            self.failures.append(f"{section}, {fields['dtype']}, {fields['parameters']}: {fields['failed']}")

    def collect(self, section: str, what: str, records: Iterable[dict[str, Any]]) -> None:
        """Adds records as they come; if time is up they are not begun, and `what` is noted as left out."""
        if time.monotonic() >= self.deadline:
            self.left_out.append(f"{section} {what}")
            return
        with self.guard(f"{section} {what}"):
            for record in records:
                self.add(section, **record)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """An error inside is a failure of the report, not its end: what was measured must not be lost with it."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {describe_error(error)}")
            traceback.print_exc()
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


def run_tests(report: Report) -> None:
    """The kernels' tests marked gpu, in a process of their own."""
    folder = "tests/kernels"
    chosen = (f"{folder}/test_gather_tokens.py", "-k", "triton") if report.dry_run else (folder, "-m", "gpu")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider", *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TESTS_SECONDS,
    )
    (report.out / "tests.log").write_text(done.stdout + done.stderr)
    last_line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    report.add("tests", returncode=done.returncode, summary=last_line)
    print(f"tests: {last_line}", flush=True)
    if done.returncode:
        report.failures.append(f"tests: {last_line}; see tests.log")


def run_accuracy(report: Report) -> None:
    """Error ratios of every shape and dtype."""
    dtypes = accuracy.served_dtypes("triton", report.device)
    for shape in accuracy.SHAPES[:1] if report.dry_run else (*accuracy.SHAPES, *accuracy.LARGE):
        report.collect("accuracy", str(shape), accuracy.measure([shape], dtypes, "triton", report.device))
    found = of(report.records, "accuracy")
    report.failures += [f"accuracy: {record}" for record in found if not accuracy.passes(record)]
    print(render_error_ratios(found), flush=True)


def run_ceilings(report: Report) -> None:
    """What the card does at best: large matrix products, a large copy."""
    for dtype in ("fp16", "bf16"):
        rate = matmul_peak(dtype, report.device, report.sides) / 1e3
        report.add("ceilings", what=f"matmul {dtype}", rate=rate, unit="TFLOP/s")
    rate = copy_peak(report.device, 2**14 if report.dry_run else COPIED) / 1e3
    report.add("ceilings", what="copy", rate=rate, unit="TB/s")


def run_attention(report: Report) -> None:
    """Forward, backward and both, of every rival that serves the shape: ViT-B at 384, 448 and 512 pixels."""
    measure_problems(report, [TINY] if report.dry_run else goal_problems())


def run_shapes(report: Report) -> None:
    """The same for all other shapes, as long as time is left."""
    measure_problems(report, [] if report.dry_run else other_problems())


def goal_problems() -> list[Problem]:
    """Those that matter most."""
    sizes = itertools.product(("bf16", "fp16"), (577, 785, 1025), (8, 64))
    return [Problem(batch, tokens, HEADS[64], 64, dtype, "cuda") for dtype, tokens, batch in sizes]


def other_problems() -> list[Problem]:
    """What else there is to know, when all other sections are done."""
    sizes = itertools.product(HEADS.items(), ("bf16", "fp16"), (197, 577, 785, 1025, 2305), (8, 64))
    every = [Problem(batch, tokens, heads, dim, dtype, "cuda") for (dim, heads), dtype, tokens, batch in sizes]
    return [problem for problem in every if problem not in goal_problems()]


def measure_problems(report: Report, problems: Sequence[Problem]) -> None:
    for problem in problems:
        rivals = dict(RIVALS["cuda"])
        if problem != COMPILED_PROBLEM:
            del rivals[COMPILED]
        records = bench_maws_attention.measure_problem(problem, rivals, report.rounds, report.warmup, report.sides)
        report.collect("attention", str(problem), records)


def run_selection(report: Report) -> None:
    """The selection alone, and the gather with its gradient, against PyTorch's chain of operators."""
    sizes = itertools.product((577, 785, 1025), (8, 64))
    problems = [Problem(batch, tokens, HEADS[64], 64, "bf16", "cuda") for tokens, batch in sizes]
    for problem in [TINY] if report.dry_run else problems:
        records = bench_selection.measure_problem(problem, report.rounds, report.warmup, ours="triton")
        report.collect("selection", str(problem), records)


def run_statistics(report: Report) -> None:
    """The lines of every head beside the attention alone, and a vector times the map against the map in PyTorch."""
    sizes = itertools.product(("bf16", "fp32"), (577, 785, 1370), (8, 64))
    problems = [Problem(batch, tokens, HEADS[64], 64, dtype, "cuda") for dtype, tokens, batch in sizes]
    for problem in [TINY] if report.dry_run else problems:
        records = gpu_statistics.measure_problem(problem, report.rounds, report.warmup)
        report.collect("statistics", str(problem), records)


def run_variants(report: Report) -> None:
    """Rows of tuning that do not ship against those that do."""
    sizes = ((785, 8), (785, 64), (577, 64), (1025, 64), (197, 64))
    problems = [Problem(batch, tokens, HEADS[64], 64, "bf16", "cuda") for tokens, batch in sizes]
    count = 1 if report.dry_run else None
    for problem, kernel in itertools.product([TINY] if report.dry_run else problems, tuning_variants.VARIANTS):
        records = tuning_variants.measure_variants(problem, kernel, report.rounds, report.warmup, count)
        report.collect("variants", f"of {kernel}, {problem}", records)


def run_model(report: Report) -> None:
    """ViT-B/16 at 448: images per second of inference and of a training step."""
    sizes, batches, dtype = {"image_size": 448, "num_select": 12}, (64, 16), "bf16"
    if report.dry_run:
        sizes, batches, dtype = {**bench_model.QUICK, "num_select": 3}, (2,), "fp32"
    config = make_config("vit_b16", **sizes)
    for batch, mode, name in itertools.product(batches, bench_model.MODES, (OURS, EAGER, OURS_PLAIN, TIMM)):
        workload = bench_model.Workload(name, mode, config, batch, dtype, report.device)
        records = bench_model.measure_alone(workload, max(1, report.rounds // 2), report.warmup)
        report.collect("model", f"{name}, {mode}, batch {batch}", records)


SECTIONS: dict[str, Callable[[Report], None]] = {
    "tests": run_tests,
    "accuracy": run_accuracy,
    "ceilings": run_ceilings,
    "attention": run_attention,
    "selection": run_selection,
    "statistics": run_statistics,
    "variants": run_variants,
    "model": run_model,
    "shapes": run_shapes,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and prints the summary; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5, help="no shape is begun after that long")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=tuple(SECTIONS))
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --dry_run tries the script without one")
    if arguments.dry_run and ffvt.info()["backends"]["triton"] != "available":
        parser.error("--dry_run runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.dry_run else "cuda"
    report = Report(arguments.out, device, time.monotonic() + 60 * arguments.minutes)
    gc.freeze()  # what the imports left is not walked again before every sample
    with ffvt.use_backend("triton"):
        for section in arguments.sections:
            begin = time.monotonic()
            with report.guard(section):
                SECTIONS[section](report)
            print(f"{section}: {time.monotonic() - begin:.0f} s", flush=True)
    text = summary(report.records, report.failures, report.left_out)
    (arguments.out / "summary.md").write_text(text + "\n")
    print(text)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
