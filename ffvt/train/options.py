"""Every training option, declared once: its default, its meaning and its bounds. Checks and flags follow from that.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

from ffvt.data.layouts import DATASETS, canonical_name
from ffvt.errors import require
from ffvt.model.config import AUTHORS_NAMES, HEADS, LAST_BLOCKS, PRESETS
from ffvt.precision import AUTO, PRECISIONS
from ffvt.train.limits import are_numbers, as_tuple, is_integer, keeps_limit

OPTIMIZERS = ("sgd", "adamw")
DECAYS = ("cosine", "linear")
AUGMENTATIONS = ("none", "flip", "crop", "jitter", "trivial", "rand", "auto")
CLASS_WEIGHTS = ("none", "inverse", "sqrt")
DEVICES = ("auto", "cpu", "cuda")
IN_EPOCHS = {"epochs": "num_steps", "warmup_epochs": "warmup_steps", "eval_epochs": "eval_every"}
MIN_ALPHA = 0.01  # below it PyTorch's Beta distribution gives 0.5 in the place of many a 0 or 1
MODEL_OVERRIDES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")
MODEL_CHOICES = ("criterion", "head", "patch_stride", "keep_rate", "locations")  # not every kind of model has them
LONGEST_NAME = 150  # letters; a file's name has 255 bytes, and copies and locks of a run have longer ones

DATA, AUGMENTATION, MODEL, OPTIMISER = "data", "augmentation and balance", "model", "optimiser"
SCHEDULE = "schedule"
SPEED, CHECKPOINTS, EVALUATION, RUN = "precision and speed", "checkpoints", "evaluation", "run"


def option(
    default: Any,
    help: str,
    group: str,
    *,
    authors: bool = False,
    kind: type | None = None,
    count: int | str | None = None,
    **limits,
) -> Any:
    """Declares one option: a field of `TrainOptions` and a flag of the same name.

    Args:
        default: the default; False makes the flag a switch.
        help: what the option means, for `--help`.
        group: the topic under which `--help` shows it.
        authors: whether it is a flag of the authors' code, whose name stays.
        kind: the type of the flag's value where the default is None or empty.
        count: how many values the flag takes, where that is not one: the field is a tuple, () for none. "+": any number
            of integers but none.
        limits: choices, model (choices, or timm:NAME), at_least, above, or within (an interval such as "[0, 1)").
    """
    facts = {"help": help, "group": group, "authors": authors, "kind": kind or type(default)}
    facts |= {"count": count, "limits": limits}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What one training run is made of. `ffvt train --help` shows the meaning, unit and default of each option."""

    dataset: str = option("CUB", f"data set: {', '.join(DATASETS)}", DATA, authors=True)
    data_root: str = option("./data", "folder of the data set", DATA, authors=True)
    img_size: int = option(448, "side of the image that the model sees, pixels", DATA, authors=True)
    resize_size: int = option(
        600, "side to which images are resized before cropping", DATA, authors=True, within="[1, 8192]"
    )
    val_split: float = option(
        0.0,
        "fraction of the training images that chooses the best model, 0 for none: eval_split does",
        DATA,
        within="[0, 1)",
    )
    fit: str = option(
        "stretch",
        "how an image becomes a square; stretch is the authors' way",
        DATA,
        choices=("stretch", "crop", "pad"),
    )
    image_root: str = option("", "folder of the images that a csv lists, empty for data_root", DATA)
    preset: str = option("default", "PartBirds preset: easy, default or hard", DATA)
    cache_dir: str = option("", "folder in which decoded, resized images are kept, empty for no cache", DATA)
    workers: int = option(2, "processes that load images, per rank", DATA, at_least=0)
    prefetch: int = option(2, "batches that each of them keeps ready", DATA, at_least=1)

    augment: str = option(
        "",
        "random changes of training images, empty for the data set's own",
        AUGMENTATION,
        choices=("", *AUGMENTATIONS),
    )
    resized_crop: float = option(
        0.0,
        "smallest fraction of an image in a crop, which is scaled to img_size; 0: crops of img_size",
        AUGMENTATION,
        within="[0, 1]",
    )
    random_erasing: float = option(
        0.0, "fraction of training images of which a rectangle is erased", AUGMENTATION, within="[0, 1]"
    )
    mixup: float = option(
        0.0, "mix images: alpha of the Beta distribution of their shares, 0 for none", AUGMENTATION, within="[0, 100]"
    )
    cutmix: float = option(
        0.0,
        "paste rectangles of other images: alpha as of mixup, 0 for none; with mixup one or the other",
        AUGMENTATION,
        within="[0, 100]",
    )
    mean: tuple[float, ...] = option(
        (),
        "of red, green and blue, as fractions of white, to normalise by; left out: those of timm's weights, else the "
        "data set's",
        AUGMENTATION,
        kind=float,
        count=3,
        within="[0, 1]",
    )
    std: tuple[float, ...] = option(
        (), "standard deviations beside mean", AUGMENTATION, kind=float, count=3, within="[0.001, 1]"
    )
    class_weights: str = option(
        "none",
        "weigh each class in the loss by one over its training images, or over their root",
        AUGMENTATION,
        choices=CLASS_WEIGHTS,
    )
    balanced_sampling: bool = option(False, "train on images of every class equally often", AUGMENTATION)
    images_per_class: int = option(
        0,
        "put so many images of each class that a process's batch has into it, for --contrastive; 0: as they come",
        AUGMENTATION,
        at_least=0,
    )

    model_type: str = option(
        "ViT-B_16",
        f"model size: {', '.join((*AUTHORS_NAMES, *PRESETS))}; or timm:NAME, any ViT of timm",
        MODEL,
        authors=True,
        model=(*AUTHORS_NAMES, *PRESETS),
    )
    pretrained_dir: str = option(
        "",
        "weights to start from: a file, a folder with model.safetensors, timm:NAME, or hf:ORG/NAME of the Hugging Face "
        "Hub; empty for none",
        MODEL,
        authors=True,
    )
    last_block: str = option(
        "random", "start of the fusion block and final norm when loading weights", MODEL, choices=LAST_BLOCKS
    )
    feature_fusion: bool = option(False, "train FFVT; without it, the plain ViT of the same size", MODEL, authors=True)
    num_token: int = option(12, "K, tokens picked by each block", MODEL, authors=True)
    first_candidate: int = option(
        0, "tokens before this one are never picked; 1: the class token, and of timm's models all registers", MODEL
    )
    criterion: str = option(
        "maws", "what picks the tokens of FFVT, a name of ffvt.criteria: class_row, vote, random:7, ...", MODEL
    )
    head: str = option(
        "ffvt", "transfg trains a TransFG, with or without feature_fusion: one part per head", MODEL, choices=HEADS
    )
    dropout: float = option(0.1, "dropout rate", MODEL)
    embed_dim: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    depth: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    num_heads: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    mlp_dim: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    patch_size: int | None = option(None, "replaces the model size's own value", MODEL, kind=int)
    patch_stride: int | None = option(
        None,
        "pixels from one patch to the next, at most patch_size; left out: patch_size, no overlap",
        MODEL,
        kind=int,
        at_least=1,
    )
    keep_rate: float = option(
        1.0,
        "fraction of the patches that stay after each block of locations; the rest become one token",
        MODEL,
        within="(0, 1]",
    )
    locations: tuple[int, ...] = option(
        (3, 6, 9), "these blocks, from 0; not read with keep_rate 1", MODEL, kind=int, count="+"
    )

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
    contrastive: bool = option(
        False, "add the contrastive loss of TransFG: images of a class alike, of others apart (margin 0.4)", OPTIMISER
    )
    ema_decay: float = option(
        0.0, "evaluate a moving average of the weights with this decay, 0 for none", OPTIMISER, within="[0, 1)"
    )

    num_steps: int = option(10000, "optimiser steps", SCHEDULE, authors=True, at_least=1)
    warmup_steps: int = option(500, "steps of linear warm-up", SCHEDULE, authors=True, at_least=0)
    epochs: float | None = option(
        None, "passes over the training images; replaces num_steps", SCHEDULE, kind=float, above=0
    )
    warmup_epochs: float | None = option(
        None, "the warm-up in epochs; replaces warmup_steps", SCHEDULE, kind=float, at_least=0
    )
    decay_type: str = option("cosine", "decay after the warm-up", SCHEDULE, authors=True, choices=DECAYS)
    train_batch_size: int = option(8, "images per process and optimiser step", SCHEDULE, authors=True, at_least=1)
    gradient_accumulation_steps: int = option(
        1, "parts into which a batch is split", SCHEDULE, authors=True, at_least=1
    )

    precision: str = option(
        "fp32",
        "precision of the forward under autocast; auto: the fastest here, of a resumed run its own",
        SPEED,
        choices=(*PRECISIONS, AUTO),
    )
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
        500, "steps between checkpoints; a new best, the end, Ctrl-C and SIGTERM save too", CHECKPOINTS, at_least=1
    )
    resume: str = option(
        "",
        "resume from a checkpoint or from the newest intact one of a run's folder; auto: of this run's, if any",
        CHECKPOINTS,
    )
    strict: bool = option(
        False,
        "refuse to resume with other data, or with other options that change the result, instead of warning",
        CHECKPOINTS,
    )
    overwrite: bool = option(False, "replace an earlier run of this name instead of keeping it", CHECKPOINTS)

    eval_every: int = option(
        200, "steps between evaluations; the end is always evaluated", EVALUATION, authors=True, at_least=1
    )
    eval_epochs: float | None = option(
        None, "epochs between evaluations; replaces eval_every", EVALUATION, kind=float, above=0
    )
    early_stopping: int = option(
        0,
        "end after this many evaluations in a row, failed ones too, without a new best; 0: never",
        EVALUATION,
        at_least=0,
    )
    eval_batch_size: int = option(16, "images per process and evaluation step", EVALUATION, authors=True, at_least=1)
    eval_split: str = option("test", "split that is evaluated", EVALUATION)
    skip_bad_images: bool = option(
        False, "start although images that are to be evaluated cannot be read; they are left out", EVALUATION
    )

    name: str = option("ffvt", "name of the run, and of its folder under output_dir", RUN, authors=True)
    output_dir: str = option("output", "folder of the runs", RUN, authors=True)
    seed: int = option(42, "seed of weights, order, crops and dropout", RUN, authors=True, within="[-9e18, 9e18]")
    device: str = option("auto", "where to train", RUN, choices=DEVICES)
    rendezvous_timeout: float = option(300.0, "seconds to wait for the other processes at the start", RUN, above=0)
    log_every: int = option(10, "steps between lines of the log", RUN, at_least=1)
    tensorboard: bool = option(False, "write TensorBoard's event files too", RUN)

    def __post_init__(self) -> None:
        canonical_name(self.dataset)
        for declared in fields(self):
            if declared.metadata["count"]:
                object.__setattr__(self, declared.name, as_tuple(getattr(self, declared.name)))
            self._check_limits(declared)
        self._check_augmentation()
        fits = self.name.isprintable() and len(self.name) <= LONGEST_NAME
        self._require(fits, "name", f"at most {LONGEST_NAME} letters without control characters")
        place, parts = PurePath(self.name), self.gradient_accumulation_steps
        is_below = bool(place.parts) and not place.is_absolute() and ".." not in place.parts
        self._require(is_below, "name", "the name of a folder below output_dir")
        is_one = not self.fp16 or self.precision in ("fp16", "fp32")
        self._require(is_one, "precision", "fp16 (or left out) with fp16=True")
        held_out = bool(self.val_split) and self.eval_split == "val"
        self._require(not held_out, "eval_split", "another than val, which with val_split is what that holds out")
        divides = self.train_batch_size % parts == 0
        self._require(divides, "train_batch_size", f"a multiple of gradient_accumulation_steps={parts}")
        self._check_model()
        self._require(not (self.resume and self.overwrite), "overwrite", f"left out with resume={self.resume!r}")
        if self.fsdp:
            self._require(self.autocast_precision != "fp16", "precision", "bf16 or fp32 with fsdp=True")
            self._require(self.ema_decay == 0, "ema_decay", "0 with fsdp=True")
            self._require(not self.compile, "compile", "False with fsdp=True")

    def _check_augmentation(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            self._require(alpha == 0 or alpha >= MIN_ALPHA, name, f"0 or at least {MIN_ALPHA}")
        if self.mixup or self.cutmix:
            least = 2 * self.gradient_accumulation_steps
            must = f"at least 2 * gradient_accumulation_steps={least} with mixup or cutmix"
            self._require(self.train_batch_size >= least, "train_batch_size", must)
            self._require(not self.contrastive, "contrastive", "False with mixup or cutmix, which mix the classes")
        if self.augment in ("none", "flip"):
            self._require(self.resized_crop == 0, "resized_crop", f"0 with augment={self.augment!r}")
        given = "std" if self.mean else "mean"
        self._require(bool(self.mean) == bool(self.std), given, f"given with {'mean' if self.mean else 'std'}")
        if self.balanced_sampling:
            self._require(self.class_weights == "none", "class_weights", "none with balanced_sampling=True")
            self._require(self.images_per_class == 0, "images_per_class", "0 with balanced_sampling=True")
        if self.images_per_class:
            groups = self.images_per_class * self.gradient_accumulation_steps
            must = f"a multiple of images_per_class * gradient_accumulation_steps={groups}"
            self._require(self.train_batch_size % groups == 0, "train_batch_size", must)

    def _check_model(self) -> None:
        selects = self.feature_fusion and self.head == "ffvt"
        must = "maws without feature_fusion, and with head=transfg: nothing reads another"
        self._require(self.criterion == "maws" or selects, "criterion", must)
        self._require(self.keep_rate == 1 or self.head == "ffvt", "keep_rate", "1 with head=transfg")

    def _check_limits(self, declared: Field) -> None:
        name, value, facts = declared.name, getattr(self, declared.name), declared.metadata
        if facts["count"] == "+":
            self._require(isinstance(value, tuple) and value and all(map(is_integer, value)), name, "integers")
        elif facts["count"]:
            self._require(are_numbers(value, facts["count"]), name, f"{facts['count']} numbers, or empty")
        for one in value if facts["count"] else (value,):
            if isinstance(one, float):
                self._require(math.isfinite(one), name, "finite")
            for kind, limit in facts["limits"].items() if one is not None else ():
                holds, must = keeps_limit(kind, limit, one)
                self._require(holds, name, must)

    def _require(self, holds: bool, name: str, must: str) -> None:
        require(holds, "train", name, must, getattr(self, name))

    @property
    def autocast_precision(self) -> str:
        """fp32, bf16 or fp16; the authors' flag --fp16 means fp16. auto, as long as a run has not settled on one."""
        return "fp16" if self.fp16 else self.precision

    def model_fields(self, num_classes: int) -> dict[str, Any]:
        """The fields of `FFVTConfig` that these options set, beside the preset `model_type`; of those that a model of
        timm may lack, the ones that are not at their default."""
        defaults = {declared.name: declared.default for declared in fields(self)}
        given = {name: getattr(self, name) for name in MODEL_OVERRIDES if getattr(self, name) is not None}
        given |= {name: getattr(self, name) for name in MODEL_CHOICES if getattr(self, name) != defaults[name]}
        same = ("feature_fusion", "first_candidate", "dropout", "gradient_checkpointing")
        sizes = {"image_size": self.img_size, "num_classes": num_classes, "num_select": self.num_token}
        return {**given, **{name: getattr(self, name) for name in same}, **sizes}

    def in_steps(self, images: int, world_size: int) -> TrainOptions:
        """These options with what is given in epochs turned into steps, for so many training images and processes."""
        per_epoch = images / (self.train_batch_size * world_size)
        given = {steps: getattr(self, epochs) for epochs, steps in IN_EPOCHS.items()}
        steps = {name: round(count * per_epoch) for name, count in given.items() if count is not None}
        return replace(self, **{name: max(count, int(name != "warmup_steps")) for name, count in steps.items()})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
