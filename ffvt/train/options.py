"""Every training option, declared once: its default, its meaning and its bounds. Flags and checks follow from that.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any

from ffvt.data.layouts import DATASETS, canonical_name
from ffvt.errors import require
from ffvt.model.config import AUTHORS_NAMES, LAST_BLOCKS, PRESETS
from ffvt.precision import PRECISIONS
from ffvt.train.recipes import RECIPES

OPTIMIZERS = ("sgd", "adamw")
DECAYS = ("cosine", "linear")
DEVICES = ("auto", "cpu", "cuda")
IGNORED_FLAGS = ("local_rank", "fp16_opt_level")  # the authors'; torchrun and --precision decide
MODEL_OVERRIDES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")

DATA, MODEL, OPTIMISER, SCHEDULE = "data", "model", "optimiser", "schedule"
SPEED, CHECKPOINTS, EVALUATION, RUN = "precision and speed", "checkpoints", "evaluation", "run"


def option(default: Any, help: str, group: str, *, authors: bool = False, kind: type | None = None, **limits) -> Any:
    """Declares one option: a field of `TrainOptions` and a flag of the same name.

    Args:
        default: the default; False makes the flag a switch.
        help: what the option means, for `--help`.
        group: the topic under which `--help` shows it.
        authors: whether it is a flag of the authors' code, whose name stays.
        kind: the type of the flag's value where the default is None.
        limits: choices, at_least, above, or within (an interval such as "[0, 1)").
    """
    facts = {"help": help, "group": group, "authors": authors, "kind": kind or type(default), "limits": limits}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What one training run is made of. `ffvt train --help` shows the meaning, unit and default of each option."""

    dataset: str = option("CUB", f"data set: {', '.join(DATASETS)}", DATA, authors=True)
    data_root: str = option("./data", "folder of the data set", DATA, authors=True)
    img_size: int = option(448, "side of the image that the model sees, pixels", DATA, authors=True)
    resize_size: int = option(600, "side to which images are resized before cropping", DATA, authors=True)
    val_split: float = option(
        0.0,
        "fraction of the training images that chooses the best model, 0 for none: eval_split does",
        DATA,
        within="[0, 1)",
    )
    preset: str = option("default", "PartBirds preset: easy, default or hard", DATA)
    cache_dir: str = option("", "folder in which decoded, resized images are kept, empty for no cache", DATA)
    workers: int = option(2, "processes that load images, per rank", DATA, at_least=0)
    prefetch: int = option(2, "batches that each of them keeps ready", DATA, at_least=1)

    model_type: str = option("ViT-B_16", "model size", MODEL, authors=True, choices=(*AUTHORS_NAMES, *PRESETS))
    pretrained_dir: str = option("", "weight file to start from, empty for none", MODEL, authors=True)
    last_block: str = option(
        "random", "start of the fusion block and final norm when loading weights", MODEL, choices=LAST_BLOCKS
    )
    feature_fusion: bool = option(False, "train FFVT; without it, the plain ViT of the same size", MODEL, authors=True)
    num_token: int = option(12, "K, tokens picked by each block", MODEL, authors=True)
    first_candidate: int = option(0, "tokens before this one are never picked; 1: the class token", MODEL)
    dropout: float = option(0.1, "dropout rate", MODEL)
    embed_dim: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    depth: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    num_heads: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    mlp_dim: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    patch_size: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)

    optimizer: str = option("sgd", "optimiser", OPTIMISER, choices=OPTIMIZERS)
    learning_rate: float = option(3e-2, "peak learning rate", OPTIMISER, authors=True, above=0)
    weight_decay: float = option(0.0, "weight decay", OPTIMISER, authors=True, at_least=0)
    layer_decay: float = option(
        1.0, "factor of the learning rate from each block to the one below it", OPTIMISER, within="(0, 1]"
    )
    max_grad_norm: float = option(
        1.0, "norm to which gradients are clipped, 0 for none", OPTIMISER, authors=True, at_least=0
    )
    smoothing_value: float = option(0.0, "label smoothing", OPTIMISER, authors=True, within="[0, 1)")
    ema_decay: float = option(
        0.0, "evaluate a moving average of the weights with this decay, 0 for none", OPTIMISER, within="[0, 1)"
    )

    num_steps: int = option(10000, "optimiser steps", SCHEDULE, authors=True, at_least=1)
    warmup_steps: int = option(500, "steps of linear warm-up", SCHEDULE, authors=True, at_least=0)
    decay_type: str = option("cosine", "decay after the warm-up", SCHEDULE, authors=True, choices=DECAYS)
    train_batch_size: int = option(8, "images per process and optimiser step", SCHEDULE, authors=True, at_least=1)
    gradient_accumulation_steps: int = option(
        1, "parts into which a batch is split", SCHEDULE, authors=True, at_least=1
    )

    precision: str = option("fp32", "precision of the forward under autocast", SPEED, choices=PRECISIONS)
    fp16: bool = option(False, "the same as --precision fp16", SPEED, authors=True)
    loss_scale: float = option(
        0.0, "first loss scale of fp16, a power of two; 0 for 65536", SPEED, authors=True, at_least=0
    )
    max_skipped_steps: int = option(
        20, "steps in a row that are skipped for inf or NaN before the run ends", SPEED, at_least=0
    )
    tf32: bool = option(False, "allow TF32 in fp32 matrix products", SPEED)
    compile: bool = option(False, "compile the model with torch.compile", SPEED)
    fsdp: bool = option(False, "shard weights, gradients and optimiser state over the ranks (FSDP2)", SPEED)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, more time", SPEED)

    save_every: int = option(
        500, "steps between checkpoints; a new best, the end and SIGTERM save too", CHECKPOINTS, at_least=1
    )
    resume: str = option(
        "",
        "resume from a checkpoint or from the newest intact one of a run's folder; auto: of this run's, if any",
        CHECKPOINTS,
    )
    overwrite: bool = option(False, "replace an earlier run of this name instead of keeping it", CHECKPOINTS)

    eval_every: int = option(
        200, "steps between evaluations; the end is always evaluated", EVALUATION, authors=True, at_least=1
    )
    eval_batch_size: int = option(16, "images per process and evaluation step", EVALUATION, authors=True, at_least=1)
    eval_split: str = option("test", "split that is evaluated", EVALUATION)
    skip_bad_images: bool = option(False, "leave unreadable images out of evaluations instead of stopping", EVALUATION)

    name: str = option("ffvt", "name of the run, and of its folder under output_dir", RUN, authors=True)
    output_dir: str = option("output", "folder of the runs", RUN, authors=True)
    seed: int = option(42, "seed of weights, order, crops and dropout", RUN, authors=True)
    device: str = option("auto", "where to train", RUN, choices=DEVICES)
    rendezvous_timeout: float = option(300.0, "seconds to wait for the other processes at the start", RUN, above=0)
    log_every: int = option(10, "steps between lines of the log", RUN, at_least=1)
    tensorboard: bool = option(False, "write TensorBoard's event files too", RUN)

    def __post_init__(self) -> None:
        canonical_name(self.dataset)
        for declared in fields(self):
            self._check_limits(declared)
        place, parts = PurePath(self.name), self.gradient_accumulation_steps
        is_below = bool(place.parts) and not place.is_absolute() and ".." not in place.parts
        self._require(is_below, "name", "the name of a folder below output_dir")
        self._require(not (self.fp16 and self.precision == "bf16"), "precision", "fp16 (or left out) with fp16=True")
        divides = self.train_batch_size % parts == 0
        self._require(divides, "train_batch_size", f"a multiple of gradient_accumulation_steps={parts}")
        self._require(not (self.resume and self.overwrite), "overwrite", f"left out with resume={self.resume!r}")
        if self.fsdp:
            self._require(self.autocast_precision != "fp16", "precision", "bf16 or fp32 with fsdp=True")
            self._require(self.ema_decay == 0, "ema_decay", "0 with fsdp=True")
            self._require(not self.compile, "compile", "False with fsdp=True")

    def _check_limits(self, declared: Field) -> None:
        name, value, limits = declared.name, getattr(self, declared.name), declared.metadata["limits"]
        if isinstance(value, float):
            self._require(math.isfinite(value), name, "finite")
        for kind, limit in limits.items():
            holds, must = _limit(kind, limit, value)
            self._require(holds, name, must)

    def _require(self, holds: bool, name: str, must: str) -> None:
        require(holds, "train", name, must, getattr(self, name))

    @property
    def autocast_precision(self) -> str:
        """fp32, bf16 or fp16; the authors' flag --fp16 means fp16."""
        return "fp16" if self.fp16 else self.precision

    def model_fields(self, num_classes: int) -> dict[str, Any]:
        """The fields of `FFVTConfig` that these options set, beside the preset `model_type`."""
        given = {name: getattr(self, name) for name in MODEL_OVERRIDES if getattr(self, name) is not None}
        same = ("feature_fusion", "first_candidate", "dropout", "gradient_checkpointing")
        sizes = {"image_size": self.img_size, "num_classes": num_classes, "num_select": self.num_token}
        return {**given, **{name: getattr(self, name) for name in same}, **sizes}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return asdict(self)


def _limit(kind: str, limit: Any, value: Any) -> tuple[bool, str]:
    """Whether a value keeps a limit of `option`, and what the limit says."""
    if kind == "choices":
        return value in limit, f"one of {', '.join(limit)}"
    if kind == "at_least":
        return value >= limit, f"at least {limit}"
    if kind == "above":
        return value > limit, "positive" if limit == 0 else f"above {limit}"
    low, high = (float(end) for end in limit[1:-1].split(","))  # within
    from_low = value >= low if limit[0] == "[" else value > low
    to_high = value <= high if limit[-1] == "]" else value < high
    return from_low and to_high, f"in {limit}"


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every training option, by topic, and --recipe."""
    known = "; ".join(f"{name} ({recipe.known})" for name, recipe in RECIPES.items()).replace("%", "%%")
    help = f"start from the flags of a recipe, which the flags beside it override: {known}"
    parser.add_argument("--recipe", choices=RECIPES, metavar="NAME", help=help)
    groups: dict[str, Any] = {}
    for declared in fields(TrainOptions):
        facts = declared.metadata
        if facts["group"] not in groups:
            groups[facts["group"]] = parser.add_argument_group(facts["group"])
        _add_flag(groups[facts["group"]], declared.name, declared.default, facts)
    for name in IGNORED_FLAGS:
        spellings = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        groups[RUN].add_argument(*spellings, metavar="X", help="accepted and ignored (authors')")


def _add_flag(group: Any, name: str, default: Any, facts: Mapping[str, Any]) -> None:
    authors = " (authors')" if facts["authors"] else ""
    if default is False:
        switch = argparse.BooleanOptionalAction  # --no-NAME switches off what a recipe switches on
        group.add_argument(f"--{name}", action=switch, default=False, help=f"{facts['help']}{authors}")
        return
    kind, choices = facts["kind"], facts["limits"].get("choices")
    meaning = f"{facts['help']}: {', '.join(choices)}" if choices else facts["help"]
    shown = "" if default in (None, "") else f" (default: {default})"
    metavar = "NAME" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    more = {"type": kind, "default": default, "choices": choices, "metavar": metavar}
    group.add_argument(f"--{name}", help=f"{meaning}{authors}{shown}", **more)


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> TrainOptions:
    """The options in a command line; `parser` has the training flags, and perhaps more.

    A recipe's flags come first, so that those in `arguments` override them, wherever they stand. Exits with a usage
    message where an option does not hold.
    """
    values = parser.parse_args(arguments)
    if values.recipe:
        values = parser.parse_args([*RECIPES[values.recipe].flags.split(), *arguments])
    try:
        return TrainOptions(**{declared.name: getattr(values, declared.name) for declared in fields(TrainOptions)})
    except ValueError as error:
        parser.error(str(error).removeprefix("train: "))


def parse_training_flags(arguments: Sequence[str]) -> TrainOptions:
    """The options that `ffvt train` reads from these arguments. Exits with a usage message where they do not hold."""
    parser = argparse.ArgumentParser(prog="ffvt train")
    add_training_flags(parser)
    return read_options(parser, arguments)
