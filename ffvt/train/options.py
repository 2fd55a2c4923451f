"""Every training option: the authors' flags, unchanged, and ours."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from ffvt.data.datasets import DATASETS, canonical_name
from ffvt.model.config import AUTHORS_NAMES, PRESETS
from ffvt.model.weights import LAST_BLOCK_CHOICES
from ffvt.precision import PRECISIONS
from ffvt.train.optim import DECAYS, OPTIMIZERS

AT_LEAST = {  # least value: options
    1: (
        "train_batch_size",
        "eval_batch_size",
        "num_steps",
        "eval_every",
        "gradient_accumulation_steps",
        "log_every",
        "save_every",
        "prefetch",
    ),
    0: ("warmup_steps", "workers", "loss_scale", "weight_decay", "max_grad_norm", "max_skipped_steps"),
}
MODEL_OVERRIDES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")


@dataclass(frozen=True)
class TrainOptions:
    """What one training run is made of; see `add_training_flags` for the meaning and unit of each."""

    name: str = "ffvt"
    dataset: str = "CUB"
    model_type: str = "ViT-B_16"
    pretrained_dir: str = ""
    img_size: int = 448
    resize_size: int = 600
    train_batch_size: int = 8
    eval_batch_size: int = 16
    learning_rate: float = 3e-2
    weight_decay: float = 0.0
    num_steps: int = 10000
    warmup_steps: int = 500
    decay_type: str = "cosine"
    num_token: int = 12
    eval_every: int = 200
    fp16: bool = False
    feature_fusion: bool = False
    smoothing_value: float = 0.0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    seed: int = 42
    data_root: str = "./data"
    output_dir: str = "output"
    loss_scale: float = 0.0
    precision: str = "fp32"
    last_block: str = "random"
    first_candidate: int = 0
    dropout: float = 0.1
    optimizer: str = "sgd"
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    eval_split: str = "test"
    val_split: float = 0.0
    preset: str = "default"
    device: str = "auto"
    workers: int = 2
    prefetch: int = 2
    cache_dir: str = ""
    log_every: int = 10
    save_every: int = 500
    resume: str = ""
    overwrite: bool = False
    max_skipped_steps: int = 20
    skip_bad_images: bool = False
    tensorboard: bool = False
    tf32: bool = False
    compile: bool = False
    fsdp: bool = False
    gradient_checkpointing: bool = False
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    patch_size: int | None = None

    def __post_init__(self) -> None:
        canonical_name(self.dataset)
        for least, names in AT_LEAST.items():
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"train: {name} must be at least {least}; got {name}={getattr(self, name)}")
        for name, value in asdict(self).items():
            self._require(not isinstance(value, float) or math.isfinite(value), name, "finite")
        place = PurePath(self.name)
        plain = place.parts and not place.is_absolute() and ".." not in place.parts
        self._require(plain, "name", "the name of a folder below output_dir")
        parts = self.gradient_accumulation_steps
        self._require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        self._require(not (self.fp16 and self.precision == "bf16"), "precision", "fp16 (or left out) with fp16=True")
        self._require(
            self.train_batch_size % parts == 0,
            "train_batch_size",
            f"a multiple of gradient_accumulation_steps={parts}",
        )
        self._require(self.learning_rate > 0, "learning_rate", "positive")
        for name in ("smoothing_value", "val_split", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self._require(0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]")
        self._require(not (self.resume and self.overwrite), "overwrite", f"left out with resume={self.resume!r}")
        if self.fsdp:
            self._require(self.autocast_precision != "fp16", "precision", "bf16 or fp32 with fsdp=True")
            self._require(self.ema_decay == 0, "ema_decay", "0 with fsdp=True")
            self._require(not self.compile, "compile", "False with fsdp=True")

    def _require(self, holds: bool, name: str, must: str) -> None:
        if not holds:
            raise ValueError(f"train: {name} must be {must}; got {name}={getattr(self, name)!r}")

    @property
    def autocast_precision(self) -> str:
        """fp32, bf16 or fp16; the authors' flag --fp16 means fp16."""
        return "fp16" if self.fp16 else self.precision

    @property
    def model_overrides(self) -> dict[str, Any]:
        """The fields of `FFVTConfig` that replace the preset's."""
        given = {name: getattr(self, name) for name in MODEL_OVERRIDES if getattr(self, name) is not None}
        shared = {name: getattr(self, name) for name in ("first_candidate", "dropout", "gradient_checkpointing")}
        return {**given, **shared}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return asdict(self)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the authors' flags, by their names, and ours to a parser."""

    def add(group: Any, name: str, help: str, **more: Any) -> None:
        default = getattr(TrainOptions, name)
        if default is False:
            group.add_argument(f"--{name}", action="store_true", help=help)
        else:
            more.setdefault("type", type(default))
            group.add_argument(f"--{name}", default=default, help=f"{help} (default: {default})", **more)

    authors = parser.add_argument_group("the authors' flags")
    add(authors, "name", "name of the run, and of its folder under output_dir")
    add(authors, "dataset", f"data set: {', '.join(DATASETS)}")
    add(authors, "model_type", "model size", choices=(*AUTHORS_NAMES, *PRESETS))
    add(authors, "pretrained_dir", "weight file to start from, empty for none")
    add(authors, "img_size", "side of the image the model sees, pixels")
    add(authors, "resize_size", "side to which pictures are resized before cropping, pixels")
    add(authors, "train_batch_size", "images per process and optimiser step")
    add(authors, "eval_batch_size", "images per process and evaluation step")
    add(authors, "learning_rate", "peak learning rate")
    add(authors, "weight_decay", "weight decay")
    add(authors, "num_steps", "optimiser steps")
    add(authors, "warmup_steps", "steps of linear warm-up")
    add(authors, "decay_type", "decay after the warm-up", choices=DECAYS)
    add(authors, "num_token", "K, tokens picked by each block")
    add(authors, "eval_every", "steps between evaluations; the end is always evaluated")
    add(authors, "fp16", "the same as --precision fp16")
    add(authors, "feature_fusion", "train FFVT; without it, the plain ViT of the same size")
    add(authors, "smoothing_value", "label smoothing")
    add(authors, "gradient_accumulation_steps", "parts a batch is split into")
    add(authors, "max_grad_norm", "gradients are clipped to this norm, 0 for no clipping")
    add(authors, "seed", "seed of weights, order, crops and dropout")
    add(authors, "data_root", "folder of the data set")
    add(authors, "output_dir", "folder of the runs")
    add(authors, "loss_scale", "first loss scale of fp16, a power of two; 0 for 65536")

    for ignored in ("local_rank", "fp16_opt_level"):
        names = {f"--{ignored}", f"--{ignored.replace('_', '-')}"}
        authors.add_argument(*sorted(names), help="accepted and ignored: torchrun and --precision decide")

    ours = parser.add_argument_group("more flags")
    add(ours, "precision", "precision of the forward under autocast", choices=PRECISIONS)
    add(ours, "last_block", "start of the fusion block and final norm when loading weights", choices=LAST_BLOCK_CHOICES)
    add(ours, "first_candidate", "tokens before this one are never picked; 1 leaves out the class token")
    add(ours, "dropout", "dropout rate")
    add(ours, "optimizer", "optimiser", choices=OPTIMIZERS)
    add(ours, "layer_decay", "factor of the learning rate from each block to the one below it")
    add(ours, "ema_decay", "evaluate and keep a moving average of the weights with this decay, 0 for none")
    add(ours, "eval_split", "split that is evaluated")
    add(ours, "val_split", "share of the training images split off to choose the best model by, 0 to use eval_split")
    add(ours, "preset", "PartBirds preset: easy, default or hard")
    add(ours, "device", "where to train", choices=("auto", "cpu", "cuda"))
    add(ours, "workers", "processes that load images, per rank")
    add(ours, "prefetch", "batches that each of them keeps ready")
    add(ours, "cache_dir", "decode and resize pictures once and keep the pixels here, empty for no cache")
    add(ours, "log_every", "steps between lines of the log")
    add(ours, "save_every", "steps between checkpoints; new best models, the end and SIGTERM save too")
    add(
        ours, "resume", "go on from a checkpoint or the newest whole one of a run's folder; auto: of this run's, if any"
    )
    add(ours, "overwrite", "replace an earlier run of this name; without it, that is kept under another name")
    add(
        ours, "max_skipped_steps", "steps in a row with an inf or NaN in the gradients that are skipped before stopping"
    )
    add(ours, "skip_bad_images", "leave pictures that cannot be read out of evaluations instead of stopping")
    add(ours, "tensorboard", "write TensorBoard's event files too")
    add(ours, "tf32", "allow TF32 in fp32 matrix products")
    add(ours, "compile", "compile the model with torch.compile")
    add(ours, "fsdp", "divide weights, gradients and optimiser state among the ranks (FSDP2)")
    add(ours, "gradient_checkpointing", "recompute activations in the backward: less memory, more time")
    for name in MODEL_OVERRIDES:
        add(ours, name, "replaces the model size's own value", type=int)


def parse_training_flags(arguments: Sequence[str] | None = None, prog: str = "python -m ffvt.train") -> TrainOptions:
    """The options in `arguments` (sys.argv's by default). Exits with a usage message where they do not parse."""
    parser = argparse.ArgumentParser(prog=prog, description="Train FFVT (or, without --feature_fusion, a plain ViT).")
    add_training_flags(parser)
    values = vars(parser.parse_args(arguments))
    try:
        return TrainOptions(**{field.name: values[field.name] for field in fields(TrainOptions)})
    except ValueError as error:
        parser.error(str(error))
