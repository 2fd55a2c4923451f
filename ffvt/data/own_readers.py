"""Readers of a user's own images: folders of classes, lists with columns. What they find is checked in `layouts.py`."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ffvt.data.layout_readers import ListError, Listing, read_text, shown
from ffvt.errors import printable

# Of the formats that are opened (`images.FORMATS`). An animation counts as its first picture.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
PICTURE_SUFFIXES += (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm")
IMAGE_COLUMNS = ("image", "filename", "file", "path", "file_name", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
DELIMITERS = ",;\t"
KINDS_SHOWN = 6  # kinds of files left out that are named


def read_imagefolder(root: Path, split: str, classes: Sequence[str] | None) -> Listing:
    """root/split/class/**/image; hidden files and folders are passed over. The classes are the folders of train."""
    names = _class_folders(root, "train") if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(names)}
    paths: list[Path] = []
    labels: list[int] = []
    left_out = Counter(kind for kind in _kinds_beside_folders(root / split))
    unknown = []
    for name in _class_folders(root, split):
        if name not in label_of:
            unknown.append(name)
            continue
        files = _images(root / split / name, left_out)
        paths += files
        labels += [label_of[name]] * len(files)
    problems = _unknown("imagefolder", split, "class", unknown)
    if not (paths or problems):
        rest = f"; left out: {describe_left_out(left_out)}" if left_out else ""
        raise ListError(
            f"imagefolder: {split} must have images in class folders; got none in '{shown(root / split)}'{rest}"
        )
    return Listing(names, paths, labels, problems=problems, left_out=left_out)


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise ListError(
            f"imagefolder: data_root must hold {split}/<class>/<image>; got '{shown(folder)}', "
            f"which is no folder{did_you_mean(root, split)}"
        )
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def did_you_mean(root: Path, sought: str) -> str:
    """A hint where not `root` but a folder in it holds what is sought, as an archive's single top folder does."""
    if not root.is_dir():
        return ""
    below = sorted(entry for entry in root.iterdir() if (entry / sought).exists())
    return f"; did you mean '{shown(below[0])}'?" if below else ""


def _images(folder: Path, left_out: Counter) -> list[Path]:
    """The images in a class's folder and those below it; counts the other files by kind."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out.update("linked folder" for name in folders if os.path.islink(os.path.join(place, name)))
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in PICTURE_SUFFIXES:
                left_out[_kind(path)] += 1
            elif not path.is_file():
                left_out["no regular file"] += 1
            else:
                found.append(path)
    return sorted(found)


def _kinds_beside_folders(folder: Path) -> Iterator[str]:
    """The kinds of files that lie beside the class folders, and so in no class."""
    if folder.is_dir():
        yield from (
            f"{_kind(entry)} outside of the class folders"
            for entry in folder.iterdir()
            if not (entry.name.startswith(".") or entry.is_dir())
        )


def _kind(path: Path) -> str:
    return printable(path.suffix.lower(), 20) or "no suffix"


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """The files left out, by kind: ".heic 3, .txt 1". Which formats there are to convert to is said where it helps."""
    some = ", ".join(f"{kind} {count:,}" for kind, count in Counter(left_out).most_common(KINDS_SHOWN))
    more = f" and {len(left_out) - KINDS_SHOWN} more kinds" if len(left_out) > KINDS_SHOWN else ""
    is_heic = any(kind.startswith((".heic", ".heif")) for kind in left_out)
    return f"{some}{more}" + (" (convert .heic to .jpg)" if is_heic else "")


def read_csv(root: Path, split: str, classes: Sequence[str] | None, image_root: Path | None = None) -> Listing:
    """root/<split>.csv: a column of images (paths below image_root, by default root) and one of classes' names.

    The columns are known by their headings, in IMAGE_COLUMNS and LABEL_COLUMNS; commas, semicolons or tabs part them.
    """
    listed = root / f"{split}.csv"
    problems: list[str] = []
    rows = _rows(listed, problems)
    names = sorted({label for _, label in _rows(root / "train.csv", [])}) if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(names)}
    unknown = [label for _, label in rows if label not in label_of]
    problems += _unknown("csv", f"{split}.csv", "label", unknown)
    rows = [(image, label) for image, label in rows if label in label_of]
    folder = image_root or root
    return Listing(
        names,
        [folder / image for image, _ in rows],
        [label_of[label] for _, label in rows],
        image_root=image_root,
        problems=problems,
    )


def _rows(path: Path, problems: list[str]) -> list[tuple[str, str]]:
    """The rows (image, label) of a list; those that lack one of them are problems."""
    if not path.exists():
        hint = did_you_mean(path.parent, path.name)
        raise ListError(f"csv: data_root must hold {path.name}; got '{shown(path.parent)}'{hint}")
    text = read_text(path)
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ListError(
            f"csv: {shown(path)} must be a list with columns; got, after line {reader.line_num}, {error}"
        ) from error
    image, label = (_column(reader.fieldnames or (), known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image is None or label is None:
        got = printable(", ".join(reader.fieldnames or ())) or "an empty file"
        raise ListError(
            f"csv: {shown(path)} must have the columns image and label (or {', '.join(IMAGE_COLUMNS[1:])}; "
            f"{', '.join(LABEL_COLUMNS[1:])}); got {got}"
        )
    pairs = [(line, (row[image] or "").strip(), (row[label] or "").strip()) for line, row in rows]
    incomplete = [line for line, *pair in pairs if not all(pair)]
    if incomplete:
        where = f"line {incomplete[0]} ({len(incomplete)} such)"
        problems.append(f"csv: {shown(path)} must have an image and a label in every line; got one without in {where}")
    return [(file, name) for _, file, name in pairs if file and name]


def _column(headings: Iterable[str], known: Sequence[str]) -> str | None:
    """The heading that is known by the earliest of its names, in any case."""
    found = {(heading or "").strip().lower(): heading for heading in headings}
    return next((found[name] for name in known if name in found), None)


def _unknown(dataset: str, split: str, kind: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    such = f" ({len(names)} such)" if len(names) > 1 else ""
    return [f"{dataset}: {split} must have only the classes of training; got {kind} '{printable(names[0])}'{such}"]
