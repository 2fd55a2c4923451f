"""`ffvt visualize`: what every layer picks in many images, as one page to look through or as one figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ffvt.data.images import PAD_COLOUR, UNREADABLE, read_image
from ffvt.data.threads import each_ahead
from ffvt.errors import printable, require
from ffvt.files import write_whole
from ffvt.inference import Classifier, Found, Prediction, load
from ffvt.predicting import PATH_LETTERS, find_images, name_of, problem_of
from ffvt.progress import Progress
from ffvt.report.gallery_page import Gallery, render
from ffvt.report.output import figure_format, write_figure
from ffvt.report.picks import panels, patch_grid
from ffvt.report.pictures import selection_grid

PAGE = (".html", ".htm")
PAGE_BEGINNINGS = (b"<!doctype html", b"<!DOCTYPE html")
TOP = 5  # classes shown of an image
FIGURE_IMAGES = 40  # in one figure at most
CAPTION_LETTERS = 26  # of a file's name over a picture in a figure
FIGURE_SIDE = 320  # of an image in a figure, pixels, about


@dataclass(frozen=True)
class Shown:
    """One image with what the model made of it.

    Attributes:
        name: the file as it was given, fit to be shown.
        picture: RGB, upright, bounded in size.
        region: the part that the model sees, (left, top, right, bottom) as fractions of width and height.
        found: the most probable classes.
        true: its class where that is known, or None.
        index: (L-1, K) int64, the picks of each layer, or (H, 1), of each head; 0 is the class token, and any other
            that is no patch.
    """

    name: str
    picture: Image.Image
    region: tuple[float, float, float, float]
    found: Found
    true: str | None
    index: Tensor

    @property
    def correct(self) -> bool | None:
        """Whether the prediction is the true class; None where nobody knows."""
        return None if self.true is None else self.true == self.found[0][0]


def look_at(
    classifier: Classifier, images: Iterable[Any], max_size: int = 1024, labels: bool = True, threads: int = 2
) -> Iterator[Shown | tuple[str, str]]:
    """What the model makes of every image, in order; (name, problem) of one that cannot be read.

    Args:
        classifier: of an FFVT or a TransFG.
        images: as `find_images` gives them.
        max_size: of the longer side of the shown pictures, pixels.
        labels: take the name of a folder that is a class for the true class.
        threads: that read images.

    Raises:
        ValueError: the model is a plain ViT, which picks nothing.
    """
    show = partial(_show, classifier, max_size=max_size, labels=labels)
    with closing(classifier.stream(images, threads, selection=True)) as predictions:
        yield from each_ahead(show, predictions, threads, 2 * threads)


def _show(classifier: Classifier, prediction: Prediction, max_size: int, labels: bool) -> Shown | tuple[str, str]:
    name = printable(name_of(prediction), PATH_LETTERS)
    if prediction.error is not None:
        return name, problem_of(prediction)
    try:
        picture = read_image(prediction.image)
    except UNREADABLE as error:  # it was readable a moment ago
        return name, problem_of(prediction._replace(error=error))
    (width, height), region = picture.size, classifier.region(picture.size)
    picture.thumbnail((max_size, max_size))
    true = true_class(Path(prediction.image), classifier.classes) if labels else None
    shares = tuple(edge / side for edge, side in zip(region, (width, height, width, height)))
    return Shown(name, picture, shares, classifier.best(prediction.probabilities, TOP), true, prediction.index)


def true_class(path: Path, classes: Sequence[str]) -> str | None:
    """The nearest folder of a path whose name is a class; None without one."""
    return next((part for part in reversed(path.parent.parts) if part in classes), None)


def selection_figure(classifier: Classifier, shown: Sequence[Shown]) -> Any:
    """A row for each image: what the model sees of it, with name, prediction and probability, then every layer's picks,
    or the parts of all heads.

    Raises:
        ValueError: there are too many images for one figure.
    """
    must = f"at most {FIGURE_IMAGES} for one figure (.html takes any number)"
    require(len(shown) <= FIGURE_IMAGES, "visualize", "images", must, len(shown))
    config = classifier.model.config
    other = "class token" if config.num_prefix_tokens == 1 and config.keep_rate == 1 else "no patch"
    stride = -(-FIGURE_SIDE // config.grid_size)  # in whole pixels
    patches = patch_grid(config)
    patches = patches.times(stride / patches.stride)
    views = [_seen(one, round(patches.side)) for one in shown]
    index, titles = panels(torch.stack([one.index for one in shown]), config)
    captions = [(_caption(one), one.correct) for one in shown]
    return selection_grid(views, index, patches, captions, other=other, titles=titles)


def _seen(shown: Shown, side: int) -> Tensor:
    """What the model sees of a picture: uint8 (3, side, side); grey where that reaches beyond the picture."""
    sides = (*shown.picture.size, *shown.picture.size)
    box = [round(share * length) for share, length in zip(shown.region, sides)]
    width, height = max(box[2] - box[0], 1), max(box[3] - box[1], 1)
    seen = Image.new("RGB", (width, height), PAD_COLOUR)
    seen.paste(shown.picture, (-box[0], -box[1]))
    square = seen.resize((side, side), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)


def _caption(shown: Shown) -> str:
    name, probability = shown.found[0]
    true = f"\nis {printable(shown.true, 30)}" if shown.correct is False else ""
    file = Path(shown.name).name
    short = file if len(file) <= CAPTION_LETTERS else f"…{file[1 - CAPTION_LETTERS :]}"
    return f"{short}\n{printable(name, 30)} {probability:.1%}{true}"


def run(arguments: argparse.Namespace) -> int:
    """Visualizes as `arguments` say; the exit status: 1 where an image could not be read, else 0.

    Raises:
        ValueError: a bad argument or checkpoint, a plain ViT, no image that can be read. OSError: the output cannot be
        written.
    """
    is_page = Path(arguments.output).suffix.lower() in PAGE
    _check(arguments, is_page)
    given = {name: getattr(arguments, name) for name in ("device", "precision", "batch_size")}
    classifier = load(arguments.checkpoint, **given)
    if arguments.criterion:
        classifier.pick_by(arguments.criterion)
    images = find_images(arguments.images, arguments.list)
    looked = look_at(classifier, images, arguments.max_size, arguments.labels == "folder", arguments.workers)
    gallery, shown = Gallery(classifier, arguments.checkpoint), []
    with Progress(None, "visualize") as progress:
        for one in looked:
            progress.advance()
            if not isinstance(one, Shown):
                gallery.problems.append(one)
                print(f"ffvt visualize: {one[0]}: {one[1]}", file=sys.stderr)
            elif is_page:
                gallery.add(one)
            else:
                shown.append(one)
                require(
                    len(shown) <= FIGURE_IMAGES, "visualize", "images", f"at most {FIGURE_IMAGES} for a figure", "more"
                )
    if not (gallery.cards or shown):
        raise ValueError("visualize: an image must be readable; got none")
    if is_page:
        write_whole(arguments.output, render(gallery).encode())
    else:
        write_figure(selection_figure(classifier, shown), arguments.output, "visualize")
    print(printable(arguments.output, PATH_LETTERS))
    return 1 if gallery.problems else 0


def _check(arguments: argparse.Namespace, is_page: bool) -> None:
    """Refuses what cannot come to a good end, before the work."""
    require(arguments.max_size >= 16, "visualize", "max_size", "at least 16", arguments.max_size)
    require(arguments.workers >= 0, "visualize", "workers", "at least 0", arguments.workers)
    require(bool(arguments.images or arguments.list), "visualize", "images", "given: files, folders, lists or -", [])
    path = Path(arguments.output)
    if not is_page:
        figure_format(path, "visualize", also=PAGE)
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"visualize: the folder of output must exist; got output={arguments.output!r}")
    if path.exists():
        is_old = path.is_file() and (path.stat().st_size == 0 or _begins_as_a_page(path))
        require(is_old, "visualize", "output", "a page or new, other files stay", arguments.output)


def _begins_as_a_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15).startswith(PAGE_BEGINNINGS)
