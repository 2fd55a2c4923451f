"""Shared by the tests: inputs, the fp64 truth with its error, the authors' golden vectors, and small training runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ffvt
from benchmarks.oracle import explicit, rms, truth
from ffvt.data.sampling import TrainingBatch
from ffvt.model.config import make_config
from ffvt.train.checkpoint import save_checkpoint
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log

__all__ = [
    "explicit",
    "golden",
    "golden_curve",
    "heads",
    "relative_error",
    "rms",
    "skip_unserved",
    "tiny_model",
    "truth",
    "worst",
    "write_checkpoint",
]
GOLDEN = Path(__file__).parent / "golden"
SHAPES = {  # B, N, H, D
    "tiny": (1, 1, 1, 1),
    "nothing aligned": (2, 7, 3, 5),
    "one past a tile": (1, 129, 2, 32),
    "one short of a tile": (2, 64, 1, 128),
    "a tile and two": (1, 66, 2, 96),
    "prime": (1, 197, 3, 80),
    "real": (1, 577, 2, 64),
}

NARROW = dict(embed_dim=32, depth=3, num_heads=2, mlp_dim=32, device="cpu", workers=0)  # a model that trains at once
SMALL = NARROW | dict(  # options of a run of six steps
    dataset="partbirds",
    preset="easy",
    model_type="vit_s16",
    img_size=64,
    resize_size=64,
    patch_size=16,
    num_token=3,
    feature_fusion=True,
    dropout=0.0,
    train_batch_size=8,
    eval_batch_size=50,
    num_steps=6,
    warmup_steps=2,
    eval_every=4,
    log_every=1,
)
AUTHORS_COMMANDS = {
    "cotton": "--name N --dataset cotton --model_type ViT-B_16 --pretrained_dir P --img_size 384 --resize_size 500 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 2000 --fp16 --eval_every 16 --feature_fusion",
    "soyloc": "--name N --dataset soyloc --model_type ViT-B_16 --pretrained_dir P --img_size 384 --resize_size 500 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 4750 --fp16 --eval_every 50 --feature_fusion",
    "CUB": "--name N --dataset CUB --model_type ViT-B_16 --pretrained_dir P --img_size 448 --resize_size 600 "
    "--train_batch_size 8 --learning_rate 0.02 --num_steps 10000 --fp16 --eval_every 200 --feature_fusion",
    "dogs": "--name N --dataset CUB --model_type ViT-B_16 --pretrained_dir P --img_size 448 --resize_size 600 "
    "--train_batch_size 4 --learning_rate 3e-3 --num_steps 30000 --fp16 --eval_every 300 --feature_fusion "
    "--decay_type linear --num_token 24",
}


def flags(run: TrainOptions | Mapping[str, Any]) -> list[str]:
    """The command-line flags that make these options, or options of these values."""
    if isinstance(run, TrainOptions):
        own = {name: getattr(run, name) for name in run.to_dict()}
        run = {name: value for name, value in own.items() if value != getattr(TrainOptions, name)}
    parts = []
    for name, value in run.items():
        spelled = [] if value is True else value if isinstance(value, tuple) else [value]
        parts += [f"--{name}", *map(str, spelled)]
    return parts


def torchrun(processes: int, arguments: list[str], *more: str) -> list[str]:
    """A command line that trains on several processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *more]
    return [*launcher, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "ffvt.train", *arguments]


def launch(run: TrainOptions | Mapping[str, Any], folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """Trains on several processes, to the end."""
    command = torchrun(processes, flags(run))
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def values(folder: Path, kind: str = "train", key: str = "loss") -> list[Any]:
    """What the lines of one kind in a run's log have for a key, where they have it."""
    return [line[key] for line in read_log(folder) if line["kind"] == kind and key in line]


def batch_of(images: Tensor, labels: Tensor, jitter: Tensor | None = None) -> TrainingBatch:
    """What a loader gives for these images and labels, with nothing erased."""
    erased = torch.zeros(len(labels), 4, dtype=torch.int64)
    return TrainingBatch(images, labels, torch.arange(len(labels)), jitter, erased, [""] * len(labels))


def skip_unserved(backend: str, dtype: torch.dtype) -> None:
    """Skips where the kernels, or Triton's interpreter, do not know the dtype."""
    if backend in ("triton", "cpp") and dtype == torch.float64:
        pytest.skip(f"the {backend} kernels have no fp64")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly")


def heads(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    """`count` tensors (B, N, H, D) that ask for gradients, with logits spread enough to make scores differ."""
    return [(1.5 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(count)]


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference from the fp64 truth."""
    return (found.double() - expected).abs().max().item()


def golden(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of one golden file whose names start with `prefix`, without it."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def tiny_model(**overrides) -> ffvt.FFVT:
    """An FFVT of the golden vectors' size, without dropout."""
    sizes = {"image_size": 64, "num_classes": 5, "num_select": 3, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return ffvt.create_model("vit_b16", **{**sizes, "mlp_dim": 128, "dropout": 0.0, **overrides})


def write_checkpoint(
    folder: Path, classes: Sequence[str] = ("a", "b", "c"), model: dict[str, Any] | None = None, **options: Any
) -> Path:
    """A run's folder with a checkpoint of a tiny model with random weights, trained on nothing; its path."""
    made = tiny_model(num_classes=len(classes), **(model or {}))
    torch.nn.init.normal_(made.head.weight, std=0.5)
    told = {"dataset": "imagefolder", "img_size": 64, "resize_size": 72, "data_root": "photos", **options}
    facts = {"classes": list(classes), "resize_size": 72, "options": TrainOptions(**told).to_dict(), "step": 1}
    save_checkpoint(folder, 1, made.save_pretrained, facts, {"x": torch.zeros(1)}, {}, is_best=True)
    return folder


def golden_curve(
    model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], classes: int
) -> tuple[list[float], list[float]]:
    """The losses and rates of the 30 training steps that the golden files have, on the same drawn images.

    loss_of: of images (4, 3, 64, 64) and labels (4,).
    """
    optimizer = make_optimizer("sgd", model, 0.03, 0.0)
    scheduler = make_scheduler(optimizer, "cosine", 5, 30)
    draw, losses, rates = np.random.default_rng(1), [], []
    for _ in range(30):
        images = torch.from_numpy(draw.standard_normal((4, 3, 64, 64), np.float32))
        loss = loss_of(images, torch.from_numpy(draw.integers(0, classes, 4)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, rates


def relative_error(found: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest expected magnitude."""
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# What changes how much a model computes and keeps, for the tests that count it.
SMALL_MODEL = {"image_size": 112, "num_classes": 10, "depth": 4, "embed_dim": 192, "num_heads": 3, "mlp_dim": 768}
MODEL_VARIANTS = [
    {},
    {"feature_fusion": False},
    {"prune_dead_rows": False},
    {"feature_fusion": False, "prune_dead_rows": False},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "feature_fusion": False},
    {"dropout": 0.0},
    {"layer_scale": 1.0, "qkv_bias": False},
]


def named(changes: dict) -> str:
    """The changes of a variant, as the name of its test."""
    return "-".join(f"{key}={value}" for key, value in changes.items()) or "default"


def small_config(**changes) -> ffvt.FFVTConfig:
    """A small ViT-S/16."""
    return make_config("vit_s16", **{**SMALL_MODEL, **changes})
