"""Where the time of the whole model goes, and what share of the machine's best matmul rate it reaches.

    python -m benchmarks.bench_profile [--model_type vit_b16] [--image_size 448] [--batch_size 4] [--dtypes bf16 fp32]
        [--rounds 5] [--threads 2] [--out FILE] [--quick]

Inference forward and training step of FFVT as it comes, as `bench_model` runs them. The rate counts the matrix
products that are computed, attention's logits twice in a step; the share is of the fastest large `torch.mm` of the
dtype. The shares of time are those of PyTorch's profiler in one run of its own: an operator's own
time, without that of those that it calls.

Prints a markdown table and appends one JSON line per dtype and mode to benchmarks/results/profile.jsonl. --quick runs a
tiny model; it writes only where --out says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import ffvt
from benchmarks.attention_rivals import OURS
from benchmarks.bench_model import MODES, QUICK, Workload
from benchmarks.ceilings import matmul_peak
from benchmarks.harness import Case, make_parser, measure, save, stamp
from benchmarks.outcome_tables import render_profiles
from ffvt.model.config import make_config
from ffvt.model.cost import flops_per_image
from ffvt.precision import PRECISIONS


def time_shares(function: Callable[[], object]) -> dict[str, float]:
    """Operator -> its own share of the time of one call, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        # under autograd the profiler has the forward of an operator of ours under the name of its autograd function
        name = re.sub(r"^GeneratedBackwardFor_ffvt_(.*)_default$", r"ffvt::\1", event.key)
        times[name] = times.get(name, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {name: round(time / total, 5) for name, time in sorted(times.items(), key=lambda item: -item[1])}


def profile_mode(config: ffvt.FFVTConfig, mode: str, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """The time, rate and share of the peak of one mode, and its operators."""
    function = Workload(OURS, mode, config, batch, dtype, "cpu")()
    timing, peak = measure([Case(OURS, lambda: function)], rounds, 1, "cpu")[OURS], matmul_peak(dtype, "cpu")
    flops = batch * flops_per_image(config, training=mode == "step", recomputation=True)
    return {
        "dtype": dtype,
        "mode": mode,
        "milliseconds": timing.to_dict(),
        "matmul_gflops": round(peak, 1),
        "share_of_peak": round(flops / timing.median / 1e6 / peak, 4),
        "operators": time_shares(function),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and appends the records."""
    parser = make_parser(__doc__, rounds=5, warmup=1)
    parser.add_argument("--model_type", default="vit_b16")
    parser.add_argument("--image_size", type=int, default=448, help="pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["bf16", "fp32"])
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error(f"--device must be cpu; got {arguments.device}")
    torch.set_num_threads(arguments.threads)
    config = make_config(arguments.model_type, image_size=arguments.image_size)
    if arguments.quick:
        config = dataclasses.replace(config, **QUICK)
    name = "tiny" if arguments.quick else arguments.model_type
    common = {
        **stamp("profile", "cpu"),
        "parameters": f"{name} at {config.image_size} pixels, batch {arguments.batch_size}",
    }
    records = [
        {**common, **profile_mode(config, mode, dtype, arguments.batch_size, arguments.rounds)}
        for dtype in arguments.dtypes
        for mode in MODES
    ]
    print(render_profiles(records))
    save(records, arguments, "profile.jsonl")


if __name__ == "__main__":
    main()
