"""Everything that a GPU has to prove, in one command: tests, error ratios, ceilings, kernels, variants, whole model.

    python -m benchmarks.gpu_report --out DIR [--minutes 8.5] [--sections tests attention ...]
    TRITON_INTERPRET=1 python -m benchmarks.gpu_report --out DIR --dry_run      tiny sizes on the CPU, to try the script

Runs from a source tree alone. Each section appends to DIR/gpu.jsonl as soon as a shape is done, so what was measured
stays if time runs out: past the limit no shape is begun, and those left out are named. The summary comes last, on the
screen and in DIR/summary.md.

Times are of the device (CUDA events), interleaved over the rivals, medians with p20-p80. "eager": launched from
Python; "graph": replayed from a CUDA graph. "hot": the same inputs again and again; "cold": the L2 cache overwritten
before each call. TFLOP/s count useful operations, 4 B H N^2 D forward and 2.5 times that backward, never padding.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffvt
from benchmarks import accuracy
from benchmarks.attention_rivals import (
    ATTENTION_ONLY,
    COMPILED,
    EAGER,
    FUSED,
    NOT_SERVED,
    OURS,
    Rival,
    describe_error,
    eager_bytes,
    flash_colreduce,
    ours,
    serves,
)
from benchmarks.gpu_summary import of, summary
from benchmarks.harness import (
    ROOT,
    Case,
    DisagreementError,
    Timing,
    append_results,
    environment,
    measure,
    require_close,
    speedups,
)
from benchmarks.report import render_error_ratios
from ffvt.kernels import backend_torch, tuning

SECTIONS = ("tests", "accuracy", "ceilings", "attention", "selection", "variants", "model", "shapes")
HEADS = {64: 12, 80: 16, 128: 8}  # by head dimension: those of ViT-B, ViT-H, and a wide head
NUM_SELECT = 12
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODES = {"forward": 1.0, "backward": 2.5, "step": 3.5}  # useful operations, in forwards
EAGER_LIMIT = 24 * 2**30  # bytes of maps up to which the authors' form is run
GPU_TESTS = [f"tests/kernels/test_{name}.py" for name in ("gpu", "maws_attention", "gather_tokens", "backend_triton")]
TESTS_SECONDS = 300  # past it the tests count as failed, and the rest of the time is left to the measurements
BUSY_CYCLES = 200_000  # of the device's clock, about 100 us
GATE_REL = 0.05  # of the largest magnitude: both sides round to 16 bits
VARIANTS = {  # rows to measure against those that ship, for D = 64
    "forward": [
        tuning.Row(tuning.ANY, 2, 64, split, q, k, warps, stages, "variant")
        for split in (True, False)
        for q, k, warps, stages in (
            *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3)),
            *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
        )
    ],
    "query_gradient": [
        tuning.Row(tuning.ANY, 2, 64, True, q, k, warps, stages, "variant")
        for q, k, warps, stages in ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 32, 4, 3))
    ],
    "key_gradient": [
        tuning.Row(tuning.ANY, 2, 64, True, q, k, warps, stages, "variant")
        for q, k, warps, stages in ((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2))
    ],
}


@dataclass(frozen=True)
class Shape:
    """One problem of the attention section."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def parameters(self) -> dict[str, int]:
        return {"batch": self.batch, "tokens": self.tokens, "heads": self.heads, "head_dim": self.head_dim}

    @property
    def useful_flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def inputs(self, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, self.tokens, 3, self.heads, self.head_dim)
        return torch.randn(size, generator=generator, device=device).to(DTYPES[self.dtype]).requires_grad_()


COMPILED_SHAPE = Shape(8, 785, 12, 64, "bf16")  # compiling takes time that other shapes need
TINY = Shape(1, 19, 2, 64, "fp16")  # of the dry run


def goal_shapes() -> list[Shape]:
    """The shapes that matter most: ViT-B at 384, 448 and 512 pixels."""
    return [Shape(b, n, HEADS[64], 64, dtype) for dtype in ("bf16", "fp16") for n in (577, 785, 1025) for b in (8, 64)]


def other_shapes() -> list[Shape]:
    """What else there is to know, when all other sections are done."""
    every = [
        Shape(b, n, HEADS[d], d, dtype)
        for d in (64, 80, 128)
        for dtype in ("bf16", "fp16")
        for n in (197, 577, 785, 1025, 2305)
        for b in (8, 64)
    ]
    return [shape for shape in every if shape not in goal_shapes()]


@dataclass
class Report:
    """Where results go, and how much time is left."""

    out: Path
    device: str
    deadline: float
    dry_run: bool
    common: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, section: str, **fields: Any) -> None:
        record = {"benchmark": f"gpu_{section}", **self.common, **fields}
        self.records.append(record)
        append_results(self.out / "gpu.jsonl", [record])

    def has_time(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return True
        self.left_out.append(what)
        return False

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """An error inside is a failure of the report, not its end: what was measured must not be lost with it."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {describe_error(error)}")
            traceback.print_exc()

    @property
    def rounds(self) -> int:
        return 1 if self.dry_run else 15

    @property
    def warmup(self) -> int:
        return 0 if self.dry_run else 2


def run_tests(report: Report) -> None:
    """The tests marked gpu, in a process of their own."""
    marked = ["-k", "rows_are_copied and triton"] if report.dry_run else ["-m", "gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider", *marked, *GPU_TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TESTS_SECONDS,
    )
    (report.out / "tests.log").write_text(done.stdout + done.stderr)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    report.add("tests", returncode=done.returncode, summary=summary)
    print(f"tests: {summary}", flush=True)
    if done.returncode:
        report.failures.append(f"tests: {summary}; see tests.log")


def run_accuracy(report: Report) -> None:
    """Error ratios of every shape and dtype."""
    shapes = accuracy.SHAPES[:1] if report.dry_run else (*accuracy.SHAPES, *accuracy.LARGE)
    dtypes = ("fp32", "fp16") if report.device == "cpu" else ("fp32", "fp16", "bf16")
    for shape in shapes:
        for dtype in dtypes if report.has_time(f"accuracy {shape}") else ():
            ratios = accuracy.compare(shape, dtype, "triton", report.device)
            found = {"backend": "triton", "shape": shape, "dtype": dtype, **ratios}
            report.add("accuracy", **found)
            if not accuracy.passes(found):
                report.failures.append(f"accuracy: {found}")
    print(render_error_ratios(of(report.records, "accuracy")), flush=True)


def run_ceilings(report: Report) -> None:
    """What the card does at best: large matrix products, a large copy."""
    size = 64 if report.dry_run else 8192
    for dtype in ("fp16", "bf16"):
        a, b = (torch.randn(size, size, device=report.device).to(DTYPES[dtype]) for _ in range(2))
        timing = time_one(report, partial(torch.matmul, a, b))
        report.add(
            "ceilings", what=f"matmul {dtype}", tflops=2 * size**3 / timing.median / 1e9, time_ms=timing.to_dict()
        )
    source = torch.randn(size * size * 4, device=report.device)
    target = torch.empty_like(source)
    timing = time_one(report, partial(target.copy_, source))
    moved = 2 * source.numel() * source.element_size()
    report.add("ceilings", what="copy", terabytes_per_second=moved / timing.median / 1e9, time_ms=timing.to_dict())


def time_one(report: Report, function: Callable[[], object]) -> Timing:
    return measure([Case("it", lambda: function)], report.rounds, report.warmup, report.device)["it"]


def matmul_peak(report: Report, dtype: str) -> float | None:
    """TFLOP/s of the large matrix product of this run, if it was measured."""
    for record in report.records:
        if record["benchmark"] == "gpu_ceilings" and record["what"] == f"matmul {dtype}":
            return record["tflops"]
    return None


def run_attention(report: Report) -> None:
    """Forward, backward and both, of every rival that serves the shape, at the shapes that matter most."""
    measure_shapes(report, [TINY] if report.dry_run else goal_shapes())


def run_shapes(report: Report) -> None:
    """The same for all other shapes, as long as time is left."""
    measure_shapes(report, [] if report.dry_run else other_shapes())


def measure_shapes(report: Report, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        if report.has_time(f"attention {shape}"):
            with report.guard(f"attention {shape}"):
                measure_shape(report, shape, {**FUSED, **ATTENTION_ONLY})
            free(report)


def measure_shape(report: Report, shape: Shape, rivals: dict[str, Rival]) -> None:
    """Gate, then every mode and launch of one shape; one record per rival."""
    qkv = shape.inputs(report.device)
    serving = {}
    for name, rival in rivals.items():
        if name in (EAGER, COMPILED) and eager_bytes(tuple(qkv.shape), qkv.element_size()) > EAGER_LIMIT:
            reason = "its maps pass the memory that this report gives them"
        elif name == COMPILED and shape != COMPILED_SHAPE:
            reason = f"compiled for one shape only, {COMPILED_SHAPE}"
        else:
            reason = serves(rival, qkv, NUM_SELECT)
        if reason is None:
            serving[name] = rival
        else:
            report.add("attention", parameters=shape.parameters, dtype=shape.dtype, case=name, missing=reason)
    if OURS not in serving:
        report.failures.append(f"attention: ours does not serve {shape}")
        return
    gate(report, shape, serving, qkv)
    for mode in MODES:
        for launch, cache in (("eager", "hot"), ("graph", "hot"), ("graph", "cold")):
            if launch == "graph" and report.device == "cpu":
                continue
            record_mode(report, shape, serving, qkv, mode, launch, cache)


def gate(report: Report, shape: Shape, rivals: dict[str, Rival], qkv: Tensor) -> None:
    """Takes out the rivals whose output or gradient is not ours, or cannot be made; a disagreement is a failure.

    Picks are left to the tests: they may differ where scores are closer than the rounding of the authors' 16-bit maps.
    """
    mine = rivals[OURS](qkv, NUM_SELECT)[0]
    upstream = torch.randn_like(mine)
    (my_grad,) = torch.autograd.grad(mine, qkv, upstream)
    for name in [name for name in rivals if name != OURS]:
        try:
            out, _ = rivals[name](qkv, NUM_SELECT)
            (grad,) = torch.autograd.grad(out, qkv, upstream)
            require_close(f"out of {name}", mine, out, GATE_REL)
            require_close(f"gradient of {name}", my_grad, grad, GATE_REL)
        except DisagreementError as error:
            report.failures.append(f"attention: {shape}: {error}")
            del rivals[name]
        except NOT_SERVED as error:
            report.add(
                "attention", parameters=shape.parameters, dtype=shape.dtype, case=name, missing=describe_error(error)
            )
            del rivals[name]


def record_mode(
    report: Report, shape: Shape, rivals: dict[str, Rival], qkv: Tensor, mode: str, launch: str, cache: str
) -> None:
    """Times one mode in one launch form and adds the records."""
    functions, refused = {}, {}
    for name, rival in rivals.items():
        try:
            functions[name] = prepare(rival, qkv, mode, launch)
        except NOT_SERVED as error:  # some rival cannot be captured: a fact to report
            refused[name] = describe_error(error)
    for name, reason in refused.items():
        fields = {"parameters": shape.parameters, "dtype": shape.dtype, "case": name, "mode": mode, "launch": launch}
        report.add("attention", **fields, l2=cache, missing=reason)
    if OURS not in functions:
        report.failures.append(f"attention: ours cannot run {mode}, {launch}, {shape}: {refused[OURS]}")
        return
    timings = time_all(report, functions, cache)
    ratios = speedups(timings, OURS)
    peak = matmul_peak(report, shape.dtype)
    for name, timing in timings.items():
        tflops = MODES[mode] * shape.useful_flops / timing.median / 1e9
        report.add(
            "attention",
            parameters=shape.parameters,
            dtype=shape.dtype,
            case=name,
            mode=mode,
            launch=launch,
            l2=cache,
            time_ms=timing.to_dict(),
            tflops=round(tflops, 2),
            share_of_matmul=round(tflops / peak, 4) if peak else None,
            speed_over_ours=ratios[name],
        )


def prepare(rival: Rival, qkv: Tensor, mode: str, launch: str) -> Callable[[], object]:
    """The function to time. Its forward, for a backward, has run on the stream that a graph captures.

    Each has a leaf of its own, as autograd ties a leaf to the stream on which it was first used.
    """
    qkv = qkv.detach().requires_grad_()
    stream = torch.cuda.Stream() if launch == "graph" else None
    with ExitStack() as stack:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            stack.enter_context(torch.cuda.stream(stream))
        function = mode_function(rival, qkv, mode)
        for _ in range(2 if launch == "graph" else 1):
            function()
    if stream is None:
        return function
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return Replay(graph, function)


@dataclass(frozen=True)
class Replay:
    """A captured graph with the function that it was captured from, whose tensors the graph reads."""

    graph: torch.cuda.CUDAGraph
    function: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def mode_function(rival: Rival, qkv: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":
        inputs = qkv.detach()
        return lambda: rival(inputs, NUM_SELECT)
    out = rival(qkv, NUM_SELECT)[0]
    upstream = torch.randn_like(out)
    if mode == "backward":
        return lambda: torch.autograd.grad(out, qkv, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(rival(qkv, NUM_SELECT)[0], qkv, upstream)


def time_all(report: Report, functions: dict[str, Callable[[], object]], cache: str) -> dict[str, Timing]:
    """Interleaved times of the functions; with a hot cache several calls make one sample.

    Graphs are launched behind work that keeps the device busy, so that they are timed without their launch.
    """
    cases = [Case(name, lambda function=function: function) for name, function in functions.items()]
    if cache == "hot":
        graphs = all(isinstance(function, Replay) for function in functions.values())
        before = partial(torch.cuda._sleep, BUSY_CYCLES) if graphs else None
        calls = 1 if report.dry_run else 4
        return measure(cases, report.rounds, report.warmup, report.device, calls=calls, before=before)
    flood = torch.empty(2**28, dtype=torch.int8, device=report.device)  # several times any L2
    return measure(cases, report.rounds, report.warmup, report.device, before=flood.zero_)


def run_selection(report: Report) -> None:
    """The selection alone, and the gather with its gradient, against PyTorch's chain of operators."""
    for batch, tokens in [(1, 19)] if report.dry_run else [(b, n) for n in (577, 785, 1025) for b in (8, 64)]:
        if not report.has_time(f"selection B={batch} N={tokens}"):
            continue
        from ffvt.kernels.maws_select_triton import pick

        shape = TINY if report.dry_run else Shape(batch, tokens, HEADS[64], 64, "bf16")
        q, k, _ = shape.inputs(report.device).detach().unbind(2)
        row, column = (line.contiguous() for line in backend_torch.class_logits(q, k, 0.125))
        x = torch.randn(batch, tokens, 768, device=report.device, dtype=q.dtype)
        index = pick(row, column, NUM_SELECT, 0)[0]
        grad = torch.randn(batch, NUM_SELECT, 768, device=report.device, dtype=q.dtype)
        groups = {
            "pick from row and column": {
                OURS: lambda row=row, column=column: pick(row, column, NUM_SELECT, 0),
                "PyTorch": lambda row=row, column=column: chain(row, column),
            },
            "maws_select": {name: partial(select, name, q, k) for name in ("triton", "torch")},
            "gather_tokens": {name: partial(gather, name, x, index) for name in ("triton", "torch")},
            "gather_tokens backward": {
                name: partial(scatter, name, grad, index, tokens) for name in ("triton", "torch")
            },
        }
        if find_spec("flash_colreduce") is not None:
            groups["maws_select"]["flash-colreduce, columns alone"] = partial(flash_colreduce, q, k)
        for mode, functions in groups.items():
            for launch in ("eager", "graph") if report.device == "cuda" else ("eager",):
                launched = functions if launch == "eager" else {n: captured(f) for n, f in functions.items()}
                for name, timing in time_all(report, launched, "hot").items():
                    fields = {"parameters": {"batch": batch, "tokens": tokens}, "dtype": shape.dtype, "case": name}
                    report.add("selection", **fields, mode=mode, launch=launch, time_ms=timing.to_dict())


def chain(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes, two means, a product, a top-k: what PyTorch users write."""
    score = row.softmax(-1).mean(1) * column.softmax(-1).mean(1)
    return score.topk(NUM_SELECT).indices, score


def select(backend: str, q: Tensor, k: Tensor) -> object:
    with ffvt.use_backend(backend):
        return ffvt.maws_select(q, k, NUM_SELECT)


def gather(backend: str, x: Tensor, index: Tensor) -> object:
    with ffvt.use_backend(backend):
        return ffvt.gather_tokens(x, index)


def scatter(backend: str, grad: Tensor, index: Tensor, tokens: int) -> object:
    return torch.ops.ffvt.gather_tokens_backward(grad, index, tokens, backend)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the function."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return Replay(graph, function)


def run_variants(report: Report) -> None:
    """Rows of tuning that do not ship, one table at a time, against the ones that do: D = 64, in a CUDA graph, hot."""
    shapes = [TINY] if report.dry_run else variant_shapes()
    for shape in shapes:
        qkv = shape.inputs(report.device)
        for kernel, rows in VARIANTS.items():
            if not report.has_time(f"variants of {kernel}, {shape}"):
                continue
            mode = "forward" if kernel == "forward" else "backward"
            launch = "eager" if report.device == "cpu" else "graph"
            functions, refused = {"shipped": prepare(ours("triton"), qkv, mode, launch)}, {}
            for row in rows[:1] if report.dry_run else rows:
                with tuning.override(kernel, row):
                    try:
                        functions[describe(row)] = prepare(ours("triton"), qkv, mode, launch)
                    except Exception as error:  # a compiler may refuse a row in many ways: a fact to report
                        refused[describe(row)] = describe_error(error)
            fields = {"parameters": shape.parameters, "dtype": shape.dtype, "kernel": kernel, "mode": mode}
            if report.device == "cpu":  # an override holds while a graph is captured, not for a later call
                functions = {"shipped": functions["shipped"]}
            for name, timing in time_all(report, functions, "hot").items():
                tflops = MODES[mode] * shape.useful_flops / timing.median / 1e9
                report.add("variants", **fields, case=name, time_ms=timing.to_dict(), tflops=round(tflops, 2))
            for name, reason in refused.items():
                report.add("variants", **fields, case=name, missing=reason)
        free(report)


def variant_shapes() -> list[Shape]:
    return [Shape(b, n, HEADS[64], 64, "bf16") for n, b in ((785, 8), (785, 64), (577, 64), (1025, 64), (197, 64))]


def describe(row: tuning.Row) -> str:
    form = "class split" if row.class_split else "tail mask"
    return f"{form} {row.block_q}x{row.block_k}, {row.warps} warps, {row.stages} stages"


def run_model(report: Report) -> None:
    """ViT-B/16 at 448: images per second of inference and of a training step."""
    from benchmarks import bench_model

    config = bench_model.make_config("vit_b16", image_size=448, num_select=NUM_SELECT)
    batches = (64, 16)
    if report.dry_run:
        config = bench_model.make_config("vit_b16", **{**bench_model.QUICK, "num_select": 3})
        batches = (2,)
    rivals = [bench_model.OURS, bench_model.EAGER, bench_model.OURS_PLAIN, bench_model.TIMM]
    for batch in batches:
        for mode in bench_model.MODES:
            for name in rivals:
                if not report.has_time(f"model {name}, {mode}, batch {batch}"):
                    continue
                fields = {"parameters": {"batch": batch, "image_size": config.image_size}, "dtype": "bf16"}
                fields |= {"case": name, "mode": mode}
                dtype = "fp32" if report.dry_run else "bf16"
                try:
                    function = bench_model.Workload(name, mode, config, batch, dtype, report.device)()
                    timing = measure(
                        [Case(name, lambda f=function: f)], max(1, report.rounds // 2), report.warmup, report.device
                    )[name]
                except (ImportError, torch.OutOfMemoryError) as error:
                    report.add("model", **fields, missing=describe_error(error))
                    continue
                finally:
                    free(report)
                speed = round(batch / timing.median * 1e3, 1)
                report.add("model", **fields, time_ms=timing.to_dict(), images_per_second=speed)


def free(report: Report) -> None:
    gc.collect()
    if report.device == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and prints the summary; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5, help="no shape is begun after that long")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --dry_run tries the script without one")
    if arguments.dry_run and ffvt.info()["backends"]["triton"] != "available":
        parser.error("--dry_run runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.dry_run else "cuda"
    common = {"environment": environment(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    deadline = time.monotonic() + 60 * arguments.minutes
    report = Report(arguments.out, device, deadline, arguments.dry_run, common)
    gc.freeze()  # what the imports left is not walked again before every sample
    with ExitStack() as stack:
        if arguments.dry_run:
            stack.enter_context(ffvt.use_backend("triton"))
        for section in arguments.sections:
            begin = time.monotonic()
            with report.guard(section):
                globals()[f"run_{section}"](report)
            free(report)
            print(f"{section}: {time.monotonic() - begin:.0f} s", flush=True)
    text = summary(report.records, report.failures, report.left_out)
    (arguments.out / "summary.md").write_text(text + "\n")
    print(text)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
