"""A trained model at work: classify images, show what it picks, evaluate it on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffvt.data.datasets import open_split, recipe_of
from ffvt.data.images import load_image
from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import evaluation_view, normalize
from ffvt.model.selection import Selection
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.data import recipe_for_model
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score, evaluate


class Classifier:
    """The model of a checkpoint, with what its images go through.

    Attributes:
        model: the model, in evaluation mode.
        classes: the classes' names, in the order of the logits.
        facts: what the checkpoint says of its training: "options", "resize_size", "step", the score.
    """

    def __init__(self, model: nn.Module, facts: dict[str, Any]) -> None:
        self.model, self.facts = model.eval(), facts
        self.classes: list[str] = facts["classes"]
        self.recipe = recipe_for_model(recipe_of(facts["options"]["dataset"]), facts["options"]["model_type"])

    def transform(self, path: str | Path) -> Tensor:
        """An image file as the model sees it, before normalisation: uint8 (3, S, S).

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no readable image.
        """
        return evaluation_view(load_image(path, self.facts["resize_size"]), self.model.config.image_size, self.recipe)

    @torch.inference_mode()
    def __call__(self, paths: Sequence[str | Path], top: int = 5) -> list[list[tuple[str, float]]]:
        """For each image file its `top` most probable classes, best first, each with its probability."""
        logits = self.model(self._batch(torch.stack([self.transform(path) for path in paths])))
        best = logits.softmax(-1).topk(min(top, len(self.classes)))
        names = [[self.classes[label] for label in labels] for labels in best.indices.tolist()]
        return [list(zip(*pair)) for pair in zip(names, best.values.tolist())]

    @torch.inference_mode()
    def select(self, paths: Sequence[str | Path]) -> tuple[Tensor, list[str], Selection]:
        """The images of some files, uint8 (B, 3, S, S), the class found in each, and what every layer picked."""
        images = torch.stack([self.transform(path) for path in paths])
        logits, selection = self.model.forward_with_selection(self._batch(images))
        return images, [self.classes[label] for label in logits.argmax(1).tolist()], selection

    def _batch(self, images: Tensor) -> Tensor:
        return normalize(images.to(next(self.model.parameters()).device), self.recipe)


def load(folder: str | Path) -> Classifier:
    """The classifier of a checkpoint (`.../last`, `.../best` or `.../step-...`), on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged.
    """
    checkpoint = load_checkpoint(folder)
    return Classifier(checkpoint.model, checkpoint.facts)


def evaluate_checkpoint(
    classifier: Classifier,
    world: World,
    split: str = "test",
    dataset: str = "",
    data_root: str = "",
    batch_size: int = 16,
    precision: str = "fp32",
    workers: int = 0,
    cache_dir: str = "",
    skip_bad_images: bool = False,
) -> Score:
    """Scores a classifier on a split of the data set that it was trained on, or of another with the same classes.

    Args:
        classifier: from `load`; its model moves to the device of `world`.
        world: the processes that divide the images.
        split: the split.
        dataset, data_root: the data set and its folder; empty for those of the training.
        batch_size: images per process and step.
        precision: fp32, bf16 or fp16.
        workers: processes that load images, per rank.
        cache_dir: folder of decoded images, empty for none.
        skip_bad_images: leave unreadable images out instead of stopping.

    Raises:
        ValueError: the data set has other classes, or cannot be read.
    """
    options, config = classifier.facts["options"], classifier.model.config
    dataset = dataset or options["dataset"]
    images = open_split(
        dataset,
        split,
        image_size=config.image_size,
        resize_size=classifier.facts["resize_size"],
        data_root=data_root or options["data_root"],
        preset=options["preset"],
        seed=options["seed"],
        classes=classifier.classes,
        cache_dir=cache_dir,
    )
    if list(images.classes) != classifier.classes:
        raise ValueError(f"{dataset} must have the classes of the checkpoint; got {list(images.classes)[:3]} and so on")
    view = EvaluationView(images, config.image_size, classifier.recipe, config.grid_size, skip_bad_images)
    return evaluate(classifier.model.to(world.device), view, world, batch_size, precision, workers)
