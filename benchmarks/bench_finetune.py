"""Fine-tunes a pretrained ViT-S/14 on a folder of photographs, through the CLI: FFVT's switches beside a plain ViT.

    python -m benchmarks.bench_finetune --data_root DIR --weights FILE [--seeds 0 1] [--precision bf16]

DIR holds train/<class>/*.jpg and test/<class>/*.jpg; FILE is a timm `vit_small_patch14_dinov2` state dict. Every run
that has ended is kept in --output_dir and not made again. Appends one JSON line per run to results/finetune.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import append_results, environment
from benchmarks.outcome_tables import render_accuracies
from ffvt.train.runlog import LOG_FILE, read_log

VARIANTS = {
    "FFVT, the authors' defaults": ["--feature_fusion"],
    "FFVT, last block pretrained, class token never picked, no dropout": [
        *("--feature_fusion", "--last_block", "pretrained", "--first_candidate", "1", "--dropout", "0")
    ],
    "plain ViT, no dropout": ["--dropout", "0"],
    "FFVT, the authors' defaults but no dropout": ["--feature_fusion", "--dropout", "0"],
}
RECIPE = {
    "dataset": "imagefolder",
    "model_type": "vit_s14",
    "img_size": 112,
    "resize_size": 128,
    "train_batch_size": 32,
    "eval_batch_size": 64,
    "learning_rate": 0.02,
    "warmup_steps": 30,
    "num_token": 12,
    "eval_every": 1000000,
    "workers": 1,
}


def run_once(variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Trains one variant with one seed (unless its log says that it has ended) and returns its result."""
    name = f"finetune-{list(VARIANTS).index(variant)}-{arguments.precision}-seed{seed}"
    flags = {
        **RECIPE,
        "name": name,
        "seed": seed,
        "num_steps": arguments.num_steps,
        "precision": arguments.precision,
        "data_root": arguments.data_root,
        "pretrained_dir": arguments.weights,
        "output_dir": arguments.output_dir,
    }
    folder = Path(arguments.output_dir) / name
    if not has_ended(folder):
        command = [sys.executable, "-m", "ffvt.train", *VARIANTS[variant]]
        subprocess.run(
            [*command, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))], check=True
        )
    lines = read_log(folder)
    end = lines[-1]
    speeds = [line["images_per_second"] for line in lines if line["kind"] == "train"]
    return {
        "variant": variant,
        "seed": seed,
        "parameters": f"vit_s14 at {RECIPE['img_size']} px, {arguments.num_steps} steps of "
        f"{RECIPE['train_batch_size']}, SGD {RECIPE['learning_rate']}, {arguments.precision}",
        "top1": end["last"]["top1"],
        "images": end["last"]["count"],
        "seconds": end["seconds"],
        "train_images_per_second": statistics.median(speeds),
    }


def has_ended(folder: Path) -> bool:
    """Whether the run of this folder has trained to its end."""
    lines = read_log(folder) if (folder / LOG_FILE).exists() else []
    return bool(lines) and lines[-1]["kind"] == "end"


def main() -> None:
    """Runs every variant with every seed, appends the results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--num_steps", type=int, default=495, help="495 steps of 32 are 6 epochs of 2,640 images")
    parser.add_argument("--output_dir", default="runs/finetune")
    parser.add_argument("--out", default="benchmarks/results/finetune.jsonl")
    arguments = parser.parse_args()
    results = [run_once(variant, seed, arguments) for seed in arguments.seeds for variant in VARIANTS]
    records = [{"benchmark": "finetune", "environment": environment("cpu"), **result} for result in results]
    append_results(Path(arguments.out), records)
    print(render_accuracies(records))


if __name__ == "__main__":
    main()
