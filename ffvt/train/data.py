"""What a run sees: the images to train on, to choose the best model by, and to report the end on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ffvt.data.datasets import ImageSet, ImageSubset, open_split, recipe_of
from ffvt.data.sampling import EvaluationView, StepSampler, TrainingBatch, TrainingView, batch_as_it_is, split_off
from ffvt.data.transforms import Recipe
from ffvt.model.config import make_config
from ffvt.train.distributed import World
from ffvt.train.loading import loading
from ffvt.train.options import TrainOptions


@dataclass(frozen=True)
class Data:
    """The images of a run, under the transforms of their data set.

    Attributes:
        train: what is trained on.
        validation: what the best model is chosen on.
        test: what the end is reported on; the same as `validation` where nothing is split off.
        validation_split: the name of validation's split.
    """

    train: TrainingView
    validation: EvaluationView
    test: EvaluationView
    validation_split: str

    @property
    def classes(self) -> list[str]:
        """The classes' names, in the order of the labels."""
        return list(self.train.images.classes)

    @property
    def resize_size(self) -> int:
        """Side of the images before cropping, pixels."""
        return self.train.images.side

    @property
    def recipe(self) -> Recipe:
        """The transforms that the data set is trained with."""
        return self.train.recipe

    def batches(
        self, options: TrainOptions, world: World, step: int, samples: int
    ) -> AbstractContextManager[Iterator[TrainingBatch]]:
        """This rank's batches, from after `step` steps in which all ranks drew `samples` images, to the last step.

        They come inside of a `with` block, with whose end the loading processes end.
        """
        steps = options.num_steps - step
        sampler = StepSampler(
            len(self.train), options.train_batch_size, steps, options.seed, world.rank, world.size, samples
        )
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
    training, evaluated = (_open(options, split) for split in ("train", options.eval_split))
    recipe = recipe_of(options.dataset)
    grid_size = make_config(options.model_type, **options.model_fields(len(training.classes))).grid_size

    def evaluation(images: ImageSet) -> EvaluationView:
        return EvaluationView(images, options.img_size, recipe, grid_size, skip_bad=True)

    validation = test = evaluation(evaluated)
    validation_split = options.eval_split
    if options.val_split:
        kept, off = split_off(training.labels, options.val_split, options.seed)
        validation, validation_split = evaluation(ImageSubset(training, off)), "val"
        training = ImageSubset(training, kept)
    train = TrainingView(training, options.img_size, options.seed, recipe)
    return Data(train, validation, test, validation_split)


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
    )
