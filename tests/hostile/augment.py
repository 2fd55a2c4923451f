"""Training on one's own pictures: options that do not hold, alone or together, and classes that cannot be balanced."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ffvt.data.datasets import recipe_for
from ffvt.data.grouping import GroupSampler
from ffvt.data.mixing import Mixing
from ffvt.data.sampling import BalancedSampler, TrainingView, class_counts, class_weights
from ffvt.data.transforms import AUGMENTATIONS, PLAIN, Recipe, augmented, erase, normalize, random_view
from ffvt.train.contrastive import contrastive_loss
from ffvt.train.flags import parse_training_flags
from ffvt.train.options import TrainOptions
from ffvt.train.step import batch_loss
from tests.hostile.case import Case

HALVES = (0.5, 0.5, 0.5)
IMAGE = torch.arange(3 * 40 * 40).view(3, 40, 40).to(torch.uint8)


def options(changes: dict[str, Any], _folder: Path) -> None:
    TrainOptions(**changes)


def command_line(arguments: str, _folder: Path) -> None:
    """A usage message becomes the error that a case expects; its last line names what is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_training_flags(arguments.split())
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None


def recipe(facts: dict[str, Any], _folder: Path) -> None:
    """As a checkpoint's facts say it, after their way through JSON."""
    recipe_for(json.loads(json.dumps({"dataset": "imagefolder", **facts})))


def attempt(action: Callable[[], object]) -> Callable[[Path], None]:
    return lambda _folder: action()


def holds(claim: Callable[[], bool]) -> Callable[[Path], None]:
    """A case that must not raise: it checks what came of it."""

    def check(_folder: Path) -> None:
        if not claim():
            raise ValueError("the claim does not hold")

    return check


def smallest_picture_under_every_augmentation() -> bool:
    """Pictures exactly as large as the view: there is no room to crop."""
    views = [random_view(IMAGE, 40, augmented(PLAIN, name), torch.Generator())[0] for name in AUGMENTATIONS]
    return all(view.shape == (3, 40, 40) and view.dtype == torch.uint8 for view in views)


def one_pixel_under_every_augmentation() -> bool:
    shapes = {
        random_view(IMAGE[:, :1, :1], 1, augmented(PLAIN, name), torch.Generator())[0].shape for name in AUGMENTATIONS
    }
    return shapes == {(3, 1, 1)}


def erasing_a_view_of_one_pixel() -> bool:
    """No pixel is smaller than the view, so nothing can be erased: the rectangle is empty."""
    return not random_view(IMAGE[:, :1, :1], 1, Recipe(erasing=1.0), torch.Generator())[2][2:].prod()


def erasing_all_of_a_batch_leaves_the_mean() -> bool:
    pixels = normalize(IMAGE[None])
    erase(pixels, torch.tensor([[0, 0, 40, 40]]))
    return not pixels.any()


def black_and_white_pictures_stay_finite(policy: str) -> bool:
    flat = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    views = [random_view(flat, 32, Recipe(policy=policy), torch.Generator().manual_seed(s))[0] for s in range(30)]
    return bool(normalize(torch.stack(views)).isfinite().all())


def mixing_one_image_with_itself() -> bool:
    image, targets = Mixing(1.0, 0.0, 3)(torch.ones(1, 3, 4, 4), torch.tensor([2]), 0)
    return torch.allclose(image, torch.ones(1, 3, 4, 4)) and targets.tolist() == [[0, 0, 1]]


def one_class_has_weight_one() -> bool:
    return all(class_weights(kind, torch.tensor([12])).tolist() == [1.0] for kind in ("inverse", "sqrt"))


def extreme_counts_give_finite_weights() -> bool:
    counts = torch.tensor([1, 10**9])
    weights = class_weights("inverse", counts)
    return bool(weights.isfinite().all()) and math.isclose(
        float((weights * counts).sum() / counts.sum()), 1, rel_tol=1e-6
    )


def a_batch_of_one_rare_class_is_not_divided_by_its_weight() -> bool:
    logits, labels = torch.zeros(2, 2), torch.tensor([1, 1])
    return torch.allclose(batch_loss(logits, labels, 0.0, torch.tensor([0.5, 50.0])), torch.tensor(50 * math.log(2)))


def balanced_at_an_absurd_position() -> bool:
    """A run resumed after 10**15 images starts at once."""
    sampler = BalancedSampler([0] * 90 + [1] * 10, "ab", 4, 1, seed=1, start=10**15)
    return sorted(index >= 90 for _, index in next(iter(sampler))) == [False, False, True, True]


def groups_at_an_absurd_position() -> bool:
    sampler = GroupSampler([0] * 90 + [1] * 10, "ab", 2, 4, 1, seed=1, start=10**15)
    return sorted(index >= 90 for _, index in next(iter(sampler))) == [False, False, True, True]


def groups_of_more_images_than_a_class_has() -> bool:
    """One image a class: it comes again and again, under another key each time."""
    keys = next(iter(GroupSampler([0, 1], "ab", 50, 100, 1, seed=1)))
    return len(set(keys)) == 100 and sorted(index for _, index in keys) == [0] * 50 + [1] * 50


def pairs_of_features_of_zero_are_finite() -> bool:
    features = torch.zeros(3, 5, requires_grad=True)
    loss = contrastive_loss(features, torch.tensor([0, 0, 1]))
    loss.backward()
    return bool(loss.isfinite() & features.grad.isfinite().all())


def more_classes_than_a_batch_holds() -> bool:
    labels = [label for label in range(500) for _ in range(2)]
    drawn = [
        index for batch in BalancedSampler(labels, [str(i) for i in range(500)], 2, 500, seed=1) for _, index in batch
    ]
    return sorted(drawn[:500] + drawn[500:]) == list(range(1000))


class Nothing:
    classes, labels, side = ["a"], [0], 40

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise ValueError("never read")


OPTIONS = [  # what is wrong; the options; what the message must say
    ("mixup of NaN", {"mixup": math.nan}, "mixup=nan"),
    ("mixup of infinity", {"mixup": math.inf}, "mixup=inf"),
    ("negative mixup", {"mixup": -0.2}, "mixup=-0.2"),
    ("mixup too small for its distribution", {"mixup": 1e-30}, "mixup=1e-30"),
    ("mixup beyond its bound", {"mixup": 1e30}, "mixup=1e+30"),
    ("negative cutmix", {"cutmix": -1.0}, "cutmix=-1.0"),
    ("cutmix of NaN", {"cutmix": math.nan}, "cutmix=nan"),
    ("mixup of single images", {"mixup": 0.2, "train_batch_size": 1}, "train_batch_size=1"),
    (
        "cutmix of parts of one image",
        {"cutmix": 1.0, "train_batch_size": 8, "gradient_accumulation_steps": 8},
        "train_batch_size=8",
    ),
    ("erasing above 1", {"random_erasing": 2.0}, "random_erasing=2.0"),
    ("negative erasing", {"random_erasing": -0.5}, "random_erasing=-0.5"),
    ("erasing of NaN", {"random_erasing": math.nan}, "random_erasing=nan"),
    ("resized crop above 1", {"resized_crop": 1.5}, "resized_crop=1.5"),
    ("resized crop of unaugmented images", {"resized_crop": 0.5, "augment": "none"}, "resized_crop=0.5"),
    ("resized crop of centre crops", {"resized_crop": 0.5, "augment": "flip"}, "augment='flip'"),
    ("unknown augmentation", {"augment": "cutout"}, "augment='cutout'"),
    ("augmentation in capitals", {"augment": "RAND"}, "augment='RAND'"),
    ("mean of two numbers", {"mean": (0.5, 0.5), "std": HALVES}, "mean=(0.5, 0.5)"),
    ("mean of four numbers", {"mean": (0.5,) * 4, "std": HALVES}, "mean must be 3 numbers"),
    ("mean that is one number", {"mean": 0.5, "std": HALVES}, "mean=0.5"),
    ("mean that is text", {"mean": "0.5 0.5 0.5", "std": HALVES}, "mean='0.5 0.5 0.5'"),
    ("mean of texts", {"mean": ["0.5"] * 3, "std": HALVES}, "mean must be 3 numbers"),
    ("mean of truths", {"mean": [True] * 3, "std": HALVES}, "mean must be 3 numbers"),
    ("mean with NaN", {"mean": (0.5, math.nan, 0.5), "std": HALVES}, "mean=(0.5, nan, 0.5)"),
    ("mean of 0 to 255", {"mean": (123.7, 116.3, 103.5), "std": HALVES}, "mean must be in [0, 1]"),
    ("mean without std", {"mean": HALVES}, "std must be given with mean"),
    ("std without mean", {"std": HALVES}, "mean must be given with std"),
    ("std of 0", {"mean": HALVES, "std": (0.2, 0.2, 0.0)}, "std=(0.2, 0.2, 0.0)"),
    ("negative std", {"mean": HALVES, "std": (-0.2, 0.2, 0.2)}, "std=(-0.2, 0.2, 0.2)"),
    ("std of 0 to 255", {"mean": HALVES, "std": (58.4, 57.1, 57.4)}, "std must be in [0.001, 1]"),
    ("std that overflows fp32", {"mean": HALVES, "std": (1e-300,) * 3}, "std must be in [0.001, 1]"),
    ("unknown class weights", {"class_weights": "balanced"}, "class_weights='balanced'"),
    ("weights of balanced classes", {"class_weights": "inverse", "balanced_sampling": True}, "class_weights='inverse'"),
]
FLAGS = [  # what is wrong; the command line; what the message must say
    ("two numbers for three", "--mean 0.5 0.5", "--mean: expected 3 arguments"),
    ("a word for a number", "--mean 0.5 0.5 x --std 1 1 1", "invalid float value: 'x'"),
    ("commas for blanks", "--mean 0.5,0.5,0.5 --std 1 1 1", "--mean: expected 3 arguments"),
    ("mixup without a number", "--mixup", "--mixup: expected one argument"),
    ("a number beyond fp64", "--mixup 1e999", "mixup=inf"),
    ("unknown name", "--augment everything", "'everything'"),
]
FACTS = [  # what is wrong; a checkpoint's options; what the message must say
    ("mean that is a number", {"mean": 0.5}, "mean=0.5"),
    ("mean that is text", {"mean": "abc"}, "mean='abc'"),
    ("mean with null", {"mean": [0.5, None, 0.5]}, "None"),
    ("mean that is a mapping", {"mean": {"r": 1}}, "mean={'r': 1}"),
    ("std of zeros", {"std": [0, 0, 0]}, "std=[0, 0, 0]"),
    ("std of infinity", {"std": [math.inf] * 3}, "std must be three finite numbers"),
    ("unknown augmentation", {"augment": "worst"}, "augment='worst'"),
]
MESSAGES = [  # what is done; how; what the message must say
    ("a class without images, balanced", lambda: BalancedSampler([0, 2], "abc", 1, 1, 0), "none of 'b'"),
    ("a class without images, weighted", lambda: class_counts([1], "ab", "class_weights"), "none of 'a'"),
    ("no images at all, balanced", lambda: BalancedSampler([], ["only"], 1, 1, 0), "none of 'only'"),
    ("control characters in an empty class", lambda: class_counts([0], ["a", "\x1b[2J\n"], "class_weights"), "\\x1b"),
    ("an empty class of an endless name", lambda: class_counts([0], ["a", "x" * 10**6], "class_weights"), "xxx"),
    ("a class without images, grouped", lambda: GroupSampler([0, 2], "abc", 1, 1, 1, 0), "none of 'b'"),
    ("more groups than classes", lambda: GroupSampler([0, 1], "ab", 1, 3, 1, 0), "images_per_class=1"),
    ("pictures of which none can be read", lambda: TrainingView(Nothing(), 32, 0)[0, 0], "10 in a row are not"),
]
CLAIMS = [
    ("groups after 10**15 images", groups_at_an_absurd_position),
    ("groups of more images than there are", groups_of_more_images_than_a_class_has),
    ("features of zero", pairs_of_features_of_zero_are_finite),
    ("pictures as small as the view", smallest_picture_under_every_augmentation),
    ("pictures of one pixel", one_pixel_under_every_augmentation),
    ("erasing one pixel", erasing_a_view_of_one_pixel),
    ("erasing everything", erasing_all_of_a_batch_leaves_the_mean),
    *(
        (f"a white picture under {name}", partial(black_and_white_pictures_stay_finite, name))
        for name in ("auto", "rand")
    ),
    ("a batch of one image, mixed", mixing_one_image_with_itself),
    ("one class, weighted", one_class_has_weight_one),
    ("a class of a thousand million", extreme_counts_give_finite_weights),
    ("a batch of one rare class", a_batch_of_one_rare_class_is_not_divided_by_its_weight),
    ("balanced after 10**15 images", balanced_at_an_absurd_position),
    ("more classes than a batch", more_classes_than_a_batch_holds),
]
CASES = [
    *(Case("flags", name, partial(options, changes), message) for name, changes, message in OPTIONS),
    *(Case("flags", f"{name}, command line", partial(command_line, given), said) for name, given, said in FLAGS),
    *(Case("checkpoint", f"{name}, in a checkpoint", partial(recipe, facts), said) for name, facts, said in FACTS),
    *(Case("augmentation", name, attempt(action), message) for name, action, message in MESSAGES),
    *(Case("augmentation", name, holds(claim), None) for name, claim in CLAIMS),
]
