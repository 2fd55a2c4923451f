"""What a run sees: the images to train on, to choose the best model by, and to report the end on."""

from __future__ import annotations

from dataclasses import dataclass

from ffvt.data.datasets import ImageSet, ImageSubset, open_split, recipe_of
from ffvt.data.sampling import EvaluationView, TrainingView, split_off
from ffvt.train.options import TrainOptions


@dataclass(frozen=True)
class Views:
    """training; choosing, by which the best model is found; final, on which the end is reported: often the same.

    chosen_on: the name of choosing's split.
    """

    training: TrainingView
    choosing: EvaluationView
    final: EvaluationView
    chosen_on: str


def open_views(options: TrainOptions) -> Views:
    """The images that `options` name, under the transforms of their data set.

    Raises:
        ValueError: the data set, its files or the sizes do not fit.
    """
    training, evaluated = (_open(options, split) for split in ("train", options.eval_split))
    recipe, size = recipe_of(options.dataset), options.img_size
    final = choosing = EvaluationView(evaluated, size, recipe, skip_bad=options.skip_bad_images)
    chosen_on = options.eval_split
    if options.val_split:
        kept, off = split_off(training.labels, options.val_split, options.seed)
        choosing = EvaluationView(ImageSubset(training, off), size, recipe, skip_bad=options.skip_bad_images)
        training, chosen_on = ImageSubset(training, kept), "val"
    return Views(TrainingView(training, size, options.seed, recipe), choosing, final, chosen_on)


def _open(options: TrainOptions, split: str) -> ImageSet:
    return open_split(
        options.dataset,
        split,
        options.img_size,
        options.resize_size,
        options.data_root,
        options.preset,
        options.seed,
        cache_dir=options.cache_dir,
    )
