"""A trained model on a data set: the score, and what was answered for every image and class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ffvt.data.datasets import ImageSet, ImageSubset, describe, open_split
from ffvt.data.headers import check_headers
from ffvt.data.layouts import canonical_name
from ffvt.data.sampling import SKIPPED, EvaluationView, split_off
from ffvt.inference import Classifier
from ffvt.progress import Progress
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score, evaluate


@dataclass(frozen=True)
class ClassScore:
    """One class of an evaluation.

    Attributes:
        name: the class.
        right: images of it that are predicted as it.
        support: images of it.
        predicted: images that are predicted as it.
    """

    name: str
    right: int
    support: int
    predicted: int

    @property
    def precision(self) -> float | None:
        """The fraction of what is predicted as this class that is of it; None where nothing is."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """The fraction of the class's images that are predicted as it; None where it has no images."""
        return self.right / self.support if self.support else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall, 2 right / (support + predicted); None where that is 0 / 0."""
        both = self.support + self.predicted
        return 2 * self.right / both if both else None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, image by image in the order of the data set.

    Attributes:
        score: the sums.
        images: the split, for the names of its files.
        true, predicted: (n,) int64 labels; -1 is predicted for an image that could not be read and is not counted.
        probability: (n,) fp32, that of the predicted class.
    """

    score: Score
    images: ImageSet
    true: Tensor
    predicted: Tensor
    probability: Tensor

    @property
    def classes(self) -> Sequence[str]:
        """The classes' names."""
        return self.images.classes

    @property
    def unread(self) -> int:
        """How many images could not be read."""
        return int((self.predicted == SKIPPED).sum())

    def name(self, index: int) -> str:
        """The file of an image, or its number."""
        return describe(self.images, index)

    def confusion(self) -> Tensor:
        """(num_classes, num_classes) int64: how many images of the row's class are predicted as the column's."""
        counted, size = self.predicted >= 0, len(self.classes)
        pairs = self.true[counted] * size + self.predicted[counted]
        return torch.bincount(pairs, minlength=size**2).view(size, size)

    def class_scores(self) -> list[ClassScore]:
        """Every class, in the order of the labels."""
        confusion = self.confusion()
        counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist())
        return [ClassScore(name, *row) for name, row in zip(self.classes, counts)]


def evaluate_checkpoint(
    classifier: Classifier,
    world: World,
    split: str = "test",
    dataset: str = "",
    data_root: str = "",
    workers: int = 0,
    cache_dir: str = "",
    skip_bad_images: bool = False,
    image_root: str = "",
) -> Evaluation:
    """Scores a classifier on a split of the data set that it was trained on, or of another with the same classes.

    Args:
        classifier: from `load`; its model moves to the device of `world`, its batch size is per process.
        world: the processes that divide the images. Every one gets all that was found.
        split: the split; "val" is what the training split off, where it did.
        dataset, data_root: the data set and its folder; empty for those of the training.
        workers: processes that load images, per rank.
        cache_dir: folder of decoded images, empty for none.
        skip_bad_images: leave unreadable images out instead of stopping.
        image_root: folder of the images that a csv lists; empty for the data set's, or that of the training.

    Raises:
        ValueError: the data set has other classes, or cannot be read.
    """
    config = classifier.model.config
    images = open_images(classifier, split, dataset, data_root, cache_dir, image_root)
    world.on_main(lambda: check_headers(None, {split: images}, skip_bad_images))
    overlap = (config.patch_size, config.patch_stride) if getattr(config, "patch_stride", None) else None
    view = EvaluationView(images, config.image_size, classifier.recipe, config.grid_size, skip_bad_images, overlap)
    model, answers = classifier.model.to(world.device), _Answers()
    with Progress(len(view), "evaluate", enabled=world.is_main) as progress:

        def each(labels: Tensor, logits: Tensor) -> None:
            answers.add(labels, logits)
            progress.advance(min(len(labels) * world.size, len(view) - progress.done))

        score = evaluate(model, view, world, classifier.batch_size, classifier.precision, workers, each=each)
    predicted, probability = answers.of_all(world, len(view))
    return Evaluation(score, images, torch.tensor(list(images.labels)), predicted, probability)


class _Answers:
    """The predictions of this rank's images."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, labels: Tensor, logits: Tensor) -> None:
        probability, predicted = logits.softmax(-1).max(-1)
        self.parts.append((predicted.cpu().masked_fill(labels.cpu() == SKIPPED, SKIPPED), probability.cpu()))

    def of_all(self, world: World, count: int) -> tuple[Tensor, Tensor]:
        """Predicted labels and their probabilities of `count` images, which the ranks took in turn."""
        predicted, probability = torch.full((count,), SKIPPED), torch.zeros(count)
        for rank, parts in enumerate(world.gather(self.parts)):
            if parts:
                own = [torch.cat(column) for column in zip(*parts)]
                predicted[rank :: world.size], probability[rank :: world.size] = own
        return predicted, probability


def open_images(
    classifier: Classifier,
    split: str = "test",
    dataset: str = "",
    data_root: str = "",
    cache_dir: str = "",
    image_root: str = "",
) -> ImageSet:
    """A split of a data set, with the classes of a classifier: the arguments are those of `evaluate_checkpoint`.

    Raises:
        ValueError: it has other classes, or cannot be read.
    """
    options = classifier.facts["options"]
    dataset, root = canonical_name(dataset or options["dataset"]), data_root or options["data_root"]
    if not data_root and dataset != "partbirds" and not Path(root).is_dir():
        raise ValueError(
            f"evaluate: data_root must be a folder; got {root!r}, as the training was told from the folder where it "
            "ran: --data_root says where it is now"
        )
    share = options["val_split"] if split == "val" and dataset == canonical_name(options["dataset"]) else 0
    inherited = options.get("image_root", "") if dataset == "csv" and not data_root else ""
    images = open_split(
        dataset,
        "train" if share else split,
        image_size=classifier.model.config.image_size,
        resize_size=classifier.facts["resize_size"],
        data_root=root,
        preset=options["preset"],
        seed=options["seed"],
        classes=classifier.classes,
        cache_dir=cache_dir,
        fit=classifier.fit,
        image_root=image_root or inherited,
        whole=classifier.recipe.whole,
    )
    if list(images.classes) != classifier.classes:
        raise ValueError(f"{dataset} must have the classes of the checkpoint; got {list(images.classes)[:3]} and so on")
    return ImageSubset(images, split_off(images.labels, share, options["seed"])[1]) if share else images
