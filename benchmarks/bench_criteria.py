"""What picking tokens by another criterion changes: accuracy, and where the picks lie. A control that picks at random
and the plain ViT stand beside them.

    python -m benchmarks.bench_criteria [--jobs 2] [--seeds 0 1 2 3 4]
    python -m benchmarks.bench_criteria --photographs DIR --weights FILE [--seeds 0 1 2]

The first trains the demo's model from scratch on PartBirds, as the demo does. The second, with DIR/{train,val}/<class>/
and a timm `vit_small_patch14_dinov2` state dict, is a screen (`benchmarks.criteria_screen`): the backbone is frozen,
and only the last block, the norm and the head are trained, on the tokens that each criterion picks. Every run appends
one JSON line to --out; a run that is there already is not made again, so that the benchmark can be stopped and started.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import criteria_screen
from benchmarks.harness import RESULTS, append_results, stamp
from benchmarks.outcome_tables import render_criteria
from ffvt import criteria
from ffvt.train.engine import train
from ffvt.train.flags import parse_training_flags

PLAIN = "plain ViT"
STEPS, BATCH = 900, 48  # the demo's: with half as many images most seeds do not learn to look at the mark


@dataclass(frozen=True)
class BirdsSetting:
    """How the runs on PartBirds are trained; the seed is the data's and the weights'."""

    steps: int

    def __str__(self) -> str:
        return f"PartBirds, the demo's model, {self.steps} steps of {BATCH}, first_candidate 1"

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Trains with one criterion, or the plain ViT: its scores on the test birds and the time it took."""
        torch.set_num_threads(1)
        chosen = ["--no-feature_fusion"] if name == PLAIN else ["--criterion", name]
        sizes = {"num_steps": self.steps, "warmup_steps": self.steps // 10, "train_batch_size": BATCH}
        rare = dict.fromkeys(("eval_every", "save_every", "log_every"), self.steps + 1)
        with tempfile.TemporaryDirectory() as folder:
            flags = {**sizes, **rare, "seed": seed, "output_dir": folder, "device": "cpu"}
            given = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
            result = train(parse_training_flags(["--recipe", "partbirds", *chosen, *given]))
        picks = result.last.selection
        return {
            "accuracy": result.last.top1,
            "images": result.last.count,
            "hit_rate": picks and picks.hit_rate,
            "random_hit_rate": picks and picks.random_hit_rate,
            "layer_hit_rates": picks and picks.layer_hit_rates,
            "seconds": round(result.seconds, 1),
        }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(records: Sequence[dict[str, Any]], names: Sequence[str], seeds: Sequence[int], setting: Any) -> list:
    """The (name, seed) that these records lack, seed by seed, so that a run that is stopped has whole seeds."""
    made = {(record["criterion"], record["seed"]) for record in records if record["parameters"] == str(setting)}
    return [(name, seed) for seed in seeds for name in names if (name, seed) not in made]


def run_all(setting: Any, todo: Sequence[tuple[str, int]], jobs: int) -> Iterator[dict[str, Any]]:
    """The records of these runs as they end, `jobs` of them at a time, each in a process with one thread."""
    head = stamp("criteria", "cpu")
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs: dict[Future, tuple[str, int]] = {pool.submit(setting.run, *job): job for job in todo}
        for number, future in enumerate(as_completed(runs), start=1):
            name, seed = runs[future]
            record = {**head, "parameters": str(setting), "criterion": name, "seed": seed, **future.result()}
            print(f"{number} of {len(todo)}: {name}, seed {seed}: {record['accuracy']:.3f}, {record['seconds']:.0f} s")
            yield record


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, appends their records and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=[*criteria.names(), PLAIN], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 to 4; with --photographs 0 to 2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--steps", type=int, help=f"of training: {STEPS}; with --photographs 6 epochs")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="screen on these instead of PartBirds")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the frozen backbone")
    parser.add_argument("--cache", type=Path, default=Path("runs/criteria"), help="folder of the backbone's tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "criteria.jsonl")
    arguments = parser.parse_args(argv)
    if (arguments.photographs is None) != (arguments.weights is None):
        parser.error("--photographs and --weights go together")
    names = [name for name in arguments.criteria if name == PLAIN or criteria.find(name)]
    if arguments.photographs is None:
        setting, seeds = BirdsSetting(arguments.steps or STEPS), arguments.seeds or range(5)
    else:
        make = partial(criteria_screen.prepare, arguments.photographs, arguments.weights, arguments.cache)
        setting, seeds = make(names, arguments.steps), arguments.seeds or range(3)
    for record in run_all(setting, missing(read_records(arguments.out), names, seeds, setting), arguments.jobs):
        append_results(arguments.out, [record])
    print(render_criteria(read_records(arguments.out)))


if __name__ == "__main__":
    main()
