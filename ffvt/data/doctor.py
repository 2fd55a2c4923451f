"""`ffvt doctor`: is a data set on disk what was published, and can it be trusted to measure anything?"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from ffvt.data.archives import extract_archive
from ffvt.data.images import open_image, orientation, to_rgb
from ffvt.data.layouts import CIFAR, LAYOUTS, Layout, Listing, canonical_name, find_root, inspect_listing, read_cifar
from ffvt.data.own_readers import describe_left_out
from ffvt.data.threads import each
from ffvt.errors import printable
from ffvt.files import file_digest

SPLITS = ("train", "test")
MORE_SPLITS = ("val",)  # looked at where there are such, in a user's own sets
SHOWN = 10  # lines of each kind in the report
NAMED = 5  # classes in one line of it


@dataclass
class Diagnosis:
    """What was found: images per split and class, and what is wrong.

    Wrong is what makes results wrong or training fail: problems: lists and folders that do not fit, counts that are not
    the published ones; unreadable: images that cannot be read, with the reason; leaks: the same image in train and
    another split; conflicts: the same image in two classes of a split.

    Worth knowing: duplicates: equal files within a class of a split; left_out: files that are no images, by split and
    kind; untested: classes without a test image; turned: images that EXIF says to turn, which is done (`upright`) but
    for the published sets; sizes: smallest, median and largest width and height, pixels.
    """

    dataset: str
    root: str
    url: str = ""
    classes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    published: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    leaks: list[tuple[str, str]] = field(default_factory=list)
    conflicts: list[tuple[str, ...]] = field(default_factory=list)
    duplicates: list[tuple[str, ...]] = field(default_factory=list)
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)
    turned: int = 0
    upright: bool = False
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not (self.problems or self.unreadable or self.leaks or self.conflicts)


def examine(dataset: str, data_root: str | Path, threads: int = 0, image_root: str | Path = "") -> Diagnosis:
    """Reads the lists, decodes and hashes every image of all splits, by `threads` threads (0: one per CPU).

    image_root: as in training.

    Raises:
        ValueError: no data set of that name.
    """
    name = canonical_name(dataset)
    if name == "partbirds":
        raise ValueError("doctor: dataset must have files; got dataset='partbirds', which is drawn from a seed")
    layout = LAYOUTS[name]
    found = Diagnosis(name, str(data_root), layout.url, published=dict(layout.counts), upright=layout.upright)
    try:
        root = find_root(layout, data_root) if name not in CIFAR else Path(data_root)
    except ValueError as error:
        found.problems.append(str(error))
        return found
    found.root = str(root)
    more = [] if layout.counts else [split for split in MORE_SPLITS if _is_there(root, name, split)]
    listings: dict[str, Listing] = {}
    for split in (*SPLITS, *more):
        try:
            listings[split], problems = _read(name, split, data_root, image_root)
        except ValueError as error:  # the other splits may be there
            problems = [str(error)]
        found.problems += [problem for problem in problems if problem not in found.problems]
    _count(found, layout, listings)
    _look_at_images(found, listings, threads)
    return found


def _is_there(root: Path, name: str, split: str) -> bool:
    return (root / (f"{split}.csv" if name == "csv" else split)).exists()


def _read(name: str, split: str, data_root: str | Path, image_root: str | Path) -> tuple[Listing, list[str]]:
    if name not in CIFAR:
        return inspect_listing(name, split, data_root, image_root=image_root)
    classes, _, labels = read_cifar(name, split, data_root)
    return Listing(classes, [], labels), []  # torchvision has checked its files


def _count(found: Diagnosis, layout: Layout, listings: dict[str, Listing]) -> None:
    for split, listing in listings.items():
        found.counts[split], found.classes = len(listing.labels), len(listing.classes)
        by_label = Counter(listing.labels)
        found.per_class[split] = {str(one): by_label[label] for label, one in enumerate(listing.classes)}
        if listing.left_out:
            found.left_out[split] = dict(listing.left_out)
        published = found.published.get(split)
        if published is not None and published != len(listing.labels):
            found.problems.append(f"{split} has {len(listing.labels):,} images; published are {published:,}")
    if listings and layout.num_classes is not None and layout.num_classes != found.classes:
        found.problems.append(f"there are {found.classes:,} classes; published are {layout.num_classes:,}")
    found.untested = [one for one, count in found.per_class.get("test", {}).items() if not count]


class _Look(NamedTuple):
    """One file: its digest, or ""; why it cannot be read, or ""; width and height; whether EXIF turns it."""

    digest: str
    problem: str
    size: tuple[int, int] | None = None
    turned: bool = False


def _look(path: Path) -> _Look:
    digest = ""
    try:
        digest = file_digest(path)
        with open_image(path) as image:
            size, turned = image.size, orientation(image) > 1
            to_rgb(image)
    except Exception as error:  # memory may be short, too
        return _Look(digest, str(error) or repr(error))
    return _Look(digest, "", size, turned)


def _look_at_images(found: Diagnosis, listings: dict[str, Listing], threads: int) -> None:
    places: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    files = [(split, *file) for split, listing in listings.items() for file in zip(listing.paths, listing.labels)]
    files = [file for file in files if os.path.isfile(file[1])]  # that others are missing is a problem already
    sizes = []
    for (split, path, label), look in zip(files, each(_look, [path for _, path, _ in files], "doctor", threads)):
        if look.problem:
            found.unreadable.append((str(path), look.problem))
        if look.digest:
            places[look.digest][split].append((str(path), label))
        if look.size:
            sizes.append(look.size)
        found.turned += look.turned
    for by_split in places.values():
        _compare(found, by_split)
    for side, lengths in zip(("width", "height"), zip(*sizes)):
        found.sizes[side] = min(lengths), int(statistics.median(lengths)), max(lengths)


def _compare(found: Diagnosis, by_split: dict[str, list[tuple[str, int]]]) -> None:
    """Files of the same contents, with their labels, by split."""
    for same in by_split.values():
        if len(same) > 1:
            kind = found.duplicates if len({label for _, label in same}) == 1 else found.conflicts
            kind.append(tuple(path for path, _ in same))
    if "train" in by_split:
        others = [path for split, same in by_split.items() if split != "train" for path, _ in same]
        found.leaks += [(by_split["train"][0][0], path) for path in others]


def render(found: Diagnosis) -> str:
    """The diagnosis as text."""
    lines = [f"{found.dataset} in {found.root}: {'in order' if found.ok else 'NOT in order'}"]
    for split, count in found.counts.items():
        published = found.published.get(split)
        lines.append(f"  {split}: {count:,} images" + (f" (published: {published:,})" if published else ""))
    if found.classes:
        lines.append(f"  {found.classes:,} classes{_balance(found.per_class.get('train', {}))}")
    if found.sizes:
        sides = (f"{side} {low:,} to {high:,}, median {middle:,}" for side, (low, middle, high) in found.sizes.items())
        lines.append(f"  pixels: {'; '.join(sides)}")
    lines += _rows("problem", found.problems)
    for title, rows in (
        ("cannot be read", [f"{path}: {reason}" for path, reason in found.unreadable]),
        ("the same image in train and another split", [f"{a} = {b}" for a, b in found.leaks]),
        ("the same image in two classes of a split", [" = ".join(same) for same in found.conflicts]),
        ("equal files within a class of a split", [" = ".join(same) for same in found.duplicates]),
    ):
        lines += _rows(title, rows)
    lines += [f"  worth knowing: {note}" for note in _notes(found)]
    if found.url:
        lines.append(f"  published at {found.url}")
    return "\n".join(printable(line, 1000) for line in lines)


def _rows(title: str, rows: Sequence[str]) -> list[str]:
    if not rows:
        return []
    more = [f"    ... and {len(rows) - SHOWN:,} more (--json has all)"] if len(rows) > SHOWN else []
    return [f"  {title}: {len(rows):,}", *(f"    {row}" for row in rows[:SHOWN]), *more]


def _balance(per_class: dict[str, int]) -> str:
    """How many training images the largest and the smallest class have."""
    if not per_class:
        return ""
    (largest, most), (smallest, least) = (pick(per_class.items(), key=lambda pair: pair[1]) for pick in (max, min))
    times = f", {most / least:.1f} times as many" if most > least > 0 else ""
    ends = (
        f"most for training in '{printable(largest, 60)}' ({most:,}), fewest in '{printable(smallest, 60)}' ({least:,})"
    )
    return f"; {ends}{times}"


def _notes(found: Diagnosis) -> list[str]:
    notes = [f"left out of {split}: {describe_left_out(kinds)}" for split, kinds in found.left_out.items()]
    if found.untested:
        some = ", ".join(f"'{printable(one, 60)}'" for one in found.untested[:NAMED])
        notes.append(f"{len(found.untested):,} classes have no test images: {some}{_and_more(found.untested)}")
    if found.turned:
        done = "is done" if found.upright else "is not done, as the authors read their sets"
        notes.append(f"EXIF says to turn {found.turned:,} images, which {done}")
    return notes


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""


def run(arguments: argparse.Namespace) -> int:
    """Prints the diagnosis; 0 if the set is in order, else 1."""
    if arguments.extract:
        names: Sequence[Path] = extract_archive(arguments.extract, arguments.data_root)
        print(f"unpacked {printable(', '.join(str(name) for name in names), 400)}", file=sys.stderr)
    found = examine(arguments.dataset, arguments.data_root, arguments.threads, arguments.image_root)
    print(json.dumps({**asdict(found), "ok": found.ok}) if arguments.json else render(found))
    return 0 if found.ok else 1
