"""`ffvt doctor`: is a data set on disk what was published, and can it be trusted to measure anything?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from ffvt.data.archives import extract_archive
from ffvt.data.images import load_image
from ffvt.data.layouts import CIFAR, LAYOUTS, Layout, Listing, canonical_name, find_root, read_cifar, read_listing
from ffvt.files import file_digest

SPLITS = ("train", "test")
SHOWN = 10  # lines of each kind in the report
AT_ONCE = 4096  # pictures given to the threads at once; an interrupt waits for these


@dataclass
class Diagnosis:
    """What was found: pictures per split, and what is wrong.

    problems: what makes results wrong or training fail: lists that do not fit, counts that are not the published ones,
    pictures that cannot be read (`unreadable`, with the reason), the same picture in train and test (`leaks`), or in
    two classes of a split (`conflicts`). duplicates: equal files within a class of a split, which are worth knowing.
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

    @property
    def ok(self) -> bool:
        return not (self.problems or self.unreadable or self.leaks or self.conflicts)


def examine(dataset: str, data_root: str | Path, threads: int = 0) -> Diagnosis:
    """Reads the lists, decodes and hashes every picture of both splits, by `threads` threads (0: one per CPU).

    Raises:
        ValueError: no data set of that name.
    """
    name = canonical_name(dataset)
    if name == "partbirds":
        raise ValueError("doctor: dataset must have files; got dataset='partbirds', which is drawn from a seed")
    layout = LAYOUTS[name]
    found = Diagnosis(name, str(data_root), layout.url, published=dict(layout.counts))
    listings: dict[str, Listing] = {}
    try:
        found.root = str(find_root(layout, data_root)) if name not in CIFAR else str(data_root)
    except ValueError as error:
        found.problems.append(str(error))
        return found
    for split in SPLITS:
        try:
            listings[split] = _read(name, split, data_root)
        except ValueError as error:  # the other split may be there
            if str(error) not in found.problems:
                found.problems.append(str(error))
    _count(found, layout, listings)
    _look_at_pictures(found, listings, threads)
    return found


def _read(name: str, split: str, data_root: str | Path) -> Listing:
    if name not in CIFAR:
        return read_listing(name, split, data_root)
    classes, _, labels = read_cifar(name, split, data_root)
    return Listing(classes, [], labels)  # torchvision has checked its files


def _count(found: Diagnosis, layout: Layout, listings: dict[str, Listing]) -> None:
    for split, listing in listings.items():
        found.counts[split], found.classes = len(listing.labels), len(listing.classes)
        published = found.published.get(split)
        if published is not None and published != len(listing.labels):
            found.problems.append(f"{split} has {len(listing.labels):,} pictures; published are {published:,}")
    if listings and layout.num_classes is not None and layout.num_classes != found.classes:
        found.problems.append(f"there are {found.classes:,} classes; published are {layout.num_classes:,}")


def _look_at_pictures(found: Diagnosis, listings: dict[str, Listing], threads: int) -> None:
    places: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    files = [(split, *file) for split, listing in listings.items() for file in zip(listing.paths, listing.labels)]
    with (
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm(total=len(files), desc="doctor", unit="picture", disable=not sys.stderr.isatty()) as progress,
    ):
        for start in range(0, len(files), AT_ONCE):
            some = files[start : start + AT_ONCE]
            for (split, path, label), (digest, problem) in zip(some, pool.map(_look, (path for _, path, _ in some))):
                progress.update()
                if problem:
                    found.unreadable.append((str(path), problem))
                if digest:
                    places[digest][split].append((str(path), label))
    for by_split in places.values():
        _compare(found, by_split)


def _compare(found: Diagnosis, by_split: dict[str, list[tuple[str, int]]]) -> None:
    """Files of the same contents, with their labels, by split."""
    for same in by_split.values():
        if len(same) > 1:
            kind = found.duplicates if len({label for _, label in same}) == 1 else found.conflicts
            kind.append(tuple(path for path, _ in same))
    if len(by_split) > 1:
        found.leaks += [(by_split["train"][0][0], path) for path, _ in by_split["test"]]


def _look(path: Path) -> tuple[str, str]:
    """A file's digest, or "", and why it cannot be read, or ""."""
    digest = ""
    try:
        digest = file_digest(path)
        load_image(path, 1)
    except Exception as error:  # decoders trip over damage in ways of their own
        return digest, str(error) or repr(error)
    return digest, ""


def render(found: Diagnosis) -> str:
    """The diagnosis as text."""
    lines = [f"{found.dataset} in {found.root}: {'in order' if found.ok else 'NOT in order'}"]
    for split, count in found.counts.items():
        published = found.published.get(split)
        lines.append(f"  {split}: {count:,} pictures" + (f" (published: {published:,})" if published else ""))
    if found.classes:
        lines.append(f"  {found.classes:,} classes")
    lines += [f"  problem: {problem}" for problem in found.problems]
    for title, rows in (
        ("cannot be read", [f"{path}: {reason}" for path, reason in found.unreadable]),
        ("the same picture in train and test", [f"{a} = {b}" for a, b in found.leaks]),
        ("the same picture in two classes of a split", [" = ".join(same) for same in found.conflicts]),
        ("equal files within a class of a split", [" = ".join(same) for same in found.duplicates]),
    ):
        if rows:
            lines.append(f"  {title}: {len(rows):,}")
            lines += [f"    {row}" for row in rows[:SHOWN]]
            if len(rows) > SHOWN:
                lines.append(f"    ... and {len(rows) - SHOWN:,} more (--json has all)")
    if found.url:
        lines.append(f"  published at {found.url}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Prints the diagnosis; 0 if the set is in order, else 1."""
    if arguments.extract:
        names: Sequence[Path] = extract_archive(arguments.extract, arguments.data_root)
        print(f"unpacked {', '.join(str(name) for name in names)}", file=sys.stderr)
    found = examine(arguments.dataset, arguments.data_root, arguments.threads)
    print(json.dumps({**asdict(found), "ok": found.ok}) if arguments.json else render(found))
    return 0 if found.ok else 1
