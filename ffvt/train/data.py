"""What a run sees: the images to train on, to choose the best model by, and to report the end on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch

from ffvt.data.datasets import ImageSet, ImageSubset, open_split, recipe_for
from ffvt.data.grouping import GroupSampler, check_groups
from ffvt.data.headers import check_headers, tell_left_out
from ffvt.data.mixing import Mixing
from ffvt.data.sampling import (
    BalancedSampler,
    EvaluationView,
    StepSampler,
    TrainingBatch,
    TrainingView,
    batch_as_it_is,
    class_counts,
    class_weights,
    split_off,
)
from ffvt.data.transforms import Recipe
from ffvt.errors import require
from ffvt.model.registry import config_of, image_statistics
from ffvt.train.data_record import Record, record_of
from ffvt.train.distributed import World
from ffvt.train.loading import loading
from ffvt.train.options import TrainOptions

LONGEST_CLASS = 1000  # letters, as a checkpoint holds


@dataclass(frozen=True)
class Data:
    """The images of a run, under the transforms of their data set.

    Attributes:
        train: what is trained on.
        validation: what the best model is chosen on.
        test: what the end is reported on; the same as `validation` where nothing is split off.
        validation_split: the name of validation's split.
        splits: the data set's own splits by name, before any part is split off.
    """

    train: TrainingView
    validation: EvaluationView
    test: EvaluationView
    validation_split: str
    splits: dict[str, ImageSet]

    @property
    def classes(self) -> list[str]:
        """The classes' names, in the order of the labels."""
        return list(self.train.images.classes)

    @cached_property
    def record(self) -> Record:
        """What a checkpoint keeps of the data set, to see later whether it is still the same."""
        return record_of(self.splits)

    @property
    def resize_size(self) -> int:
        """Side of the images before cropping, pixels."""
        return self.train.images.side

    @property
    def recipe(self) -> Recipe:
        """The transforms of the run."""
        return self.train.recipe

    def mixing(self, options: TrainOptions) -> Mixing | None:
        """What mixes the images of a batch, if anything does."""
        if not (options.mixup or options.cutmix):
            return None
        return Mixing(options.mixup, options.cutmix, len(self.classes))

    def class_weights(self, options: TrainOptions, device: torch.device) -> torch.Tensor | None:
        """The weights of the classes in the loss, (C,) fp32 on the device; None for equal ones.

        Raises:
            ValueError: a class has no training image.
        """
        if options.class_weights == "none":
            return None
        counts = class_counts(self.train.images.labels, self.classes, "class_weights")
        return class_weights(options.class_weights, counts).to(device)

    def check_images(self, skip_bad: bool) -> None:
        """Tells what was left out of the folders, and reads the header of every image file.

        Raises:
            ValueError: an image that is to be evaluated cannot be read, and is not to be skipped.
        """
        tell_left_out(self.splits)
        evaluated = {split: images for split, images in self.splits.items() if split != "train"}
        if self.validation is not self.test:
            evaluated[self.validation_split] = self.validation.images
        check_headers(self.train.images, evaluated, skip_bad)

    def batches(
        self, options: TrainOptions, world: World, step: int, samples: int
    ) -> AbstractContextManager[Iterator[TrainingBatch]]:
        """This rank's batches, from after `step` steps in which all ranks drew `samples` images, to the last step.

        They come inside of a `with` block, with whose end the loading processes end.
        """
        steps = options.num_steps - step
        cut = (options.train_batch_size, steps, options.seed, world.rank, world.size, samples)
        if options.balanced_sampling:
            sampler = BalancedSampler(self.train.images.labels, self.classes, *cut)
        elif options.images_per_class:
            sampler = GroupSampler(self.train.images.labels, self.classes, options.images_per_class, *cut)
        else:
            sampler = StepSampler(len(self.train), *cut)
        return loading(
            self.train,
            batch_as_it_is,
            options.workers,
            batch_sampler=sampler,
            pin_memory=world.device.type == "cuda",
            prefetch_factor=options.prefetch if options.workers else None,
        )


def open_data(options: TrainOptions) -> Data:
    """The images that `options` name.

    Raises:
        ValueError: the data set, its files or the sizes do not fit.
    """
    config = config_of(options.model_type, **options.model_fields(1))  # refuses what does not hold, before files
    training, evaluated = (_open(options, split) for split in ("train", options.eval_split))
    splits = {"train": training, options.eval_split: evaluated}
    recipe = recipe_for(options.to_dict(), *image_statistics(options.model_type, options.pretrained_dir))
    grid_size = config.grid_size
    overlap = (config.patch_size, config.patch_stride) if options.patch_stride else None

    def evaluation(images: ImageSet) -> EvaluationView:
        return EvaluationView(images, options.img_size, recipe, grid_size, skip_bad=True, overlap=overlap)

    validation = test = evaluation(evaluated)
    validation_split = options.eval_split
    if options.val_split:
        kept, off = split_off(training.labels, options.val_split, options.seed)
        validation, validation_split = evaluation(ImageSubset(training, off)), "val"
        training = ImageSubset(training, kept)
    if options.balanced_sampling:
        class_counts(training.labels, training.classes, "balanced_sampling")  # before anything is made
    if options.images_per_class:
        check_groups(training.labels, training.classes, options.images_per_class, options.train_batch_size)
    if options.class_weights != "none":
        class_counts(training.labels, training.classes, "class_weights")
    longest = max(training.classes, key=len)
    require(len(longest) <= LONGEST_CLASS, "train", "classes", f"named in at most {LONGEST_CLASS} letters", longest)
    train = TrainingView(training, options.img_size, options.seed, recipe)
    return Data(train, validation, test, validation_split, splits)


def _open(options: TrainOptions, split: str) -> ImageSet:
    return open_split(
        options.dataset,
        split,
        image_size=options.img_size,
        resize_size=options.resize_size,
        data_root=options.data_root,
        preset=options.preset,
        seed=options.seed,
        cache_dir=options.cache_dir,
        fit=options.fit,
        image_root=options.image_root,
    )
