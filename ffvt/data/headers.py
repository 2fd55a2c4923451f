"""Finds image files that cannot be read before training starts: by their headers, which costs little."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from ffvt.data.datasets import ImageSet, describe
from ffvt.data.images import UNREADABLE, open_image
from ffvt.data.own_readers import describe_left_out
from ffvt.data.threads import DELAY, each
from ffvt.errors import printable

log = logging.getLogger("ffvt")

NAMED = 3  # images that a message names before it only counts


def check_headers(train: ImageSet | None, evaluated: Mapping[str, ImageSet], skip_bad: bool = False) -> None:
    """Opens every image file, and tells which ones cannot be read.

    Damage behind the header is not found. Where the images come from a cache, they have been decoded whole.

    Args:
        train: what is trained on, where there is training; its unreadable images are warned about, as training
            replaces them by others.
        evaluated: what is evaluated, by the name of the split.
        skip_bad: unreadable images of these are warned about, too, as they will not be counted.

    Raises:
        ValueError: an image of `evaluated` cannot be read, without `skip_bad`.
    """
    for split, images in {**({} if train is None else {"train": train}), **evaluated}.items():
        found = unreadable(images)
        if not found:
            continue
        names = "; ".join(printable(describe(images, index), 150) for index in list(found)[:NAMED])
        more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        what = f"{len(found):,} of {len(images):,} images cannot be read: {names}{more}"
        if images is train:
            log.warning("train: %s; others are drawn in their place", what)
        elif skip_bad:
            log.warning("%s: %s; they will not be counted", split, what)
        else:
            reason = printable(next(iter(found.values())).rpartition(": ")[2], 150)
            raise ValueError(f"{split}: images must be readable, or skip_bad_images be given; {what} ({reason})")


def tell_left_out(sets: Mapping[str, ImageSet]) -> None:
    """Warns of the files in the folders of each split that are passed over, as they are no images."""
    for split, images in sets.items():
        left_out = getattr(images, "left_out", None)
        if left_out:
            log.warning("%s: files that are no images are left out: %s", split, describe_left_out(left_out))


def unreadable(images: ImageSet) -> Mapping[int, str]:
    """The images that cannot be read, as far as their headers or the cache tell, with the reasons."""
    if hasattr(images, "unreadable"):
        return images.unreadable
    paths, started = getattr(images, "paths", ()), time.perf_counter()
    reasons = enumerate(each(_reason, paths, "opening images"))
    found = {index: reason for index, reason in reasons if reason}
    seconds = time.perf_counter() - started
    if seconds > DELAY:
        log.info("opened %d images to see whether they can be read, %.0f s", len(paths), seconds)
    return found


def _reason(path: object) -> str:
    try:
        with open_image(path):
            return ""
    except UNREADABLE as error:
        return str(error)
