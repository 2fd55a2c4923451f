"""`ffvt predict`: classes for any number of images, as text, JSON lines or CSV, each as soon as it is known."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ffvt.data.images import NAMED_LETTERS
from ffvt.data.own_readers import PICTURE_SUFFIXES
from ffvt.errors import printable, require
from ffvt.inference import Classifier, Found, Prediction, Refused, load

PATH_LETTERS = 4096  # of a path that is shown, more than Linux allows
ANSWERS = {  # how files of each form begin
    "text": rb"[^\n]+(: (\d+\.\d% |error: )|\n +\d+\.\d%  )",
    "json": rb'\{"image": "',
    "csv": b"image,class_1,probability_1",
}
ANSWERS_START = 4 * PATH_LETTERS + 100  # bytes that show it


def find_images(sources: Iterable[str], lists: Sequence[str] = ()) -> Iterator[Path | Refused]:
    """The images that a command line names, in its order, found while they are asked for.

    Args:
        sources: files, taken as they are; folders, for the image files in them and below, sorted, hidden ones passed
            over; "-" for a list on standard input; "@FILE" for a list in a file.
        lists: more lists, read after that. A list has a source in every line, relative to the working directory.
    """
    for source in chain(sources, (f"@{name}" for name in lists)):
        if source == "-":
            yield from _of_list(sys.stdin.buffer)
        elif source.startswith("@"):
            try:
                with open(source[1:], "rb") as file:
                    yield from _of_list(file)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                yield Refused(source, error)
        else:
            yield from _of_path(source)


def _of_list(lines: Iterable[bytes]) -> Iterator[Path | Refused]:
    for line in lines:
        path = os.fsdecode(line.rstrip(b"\r\n"))
        if path.strip():
            yield from _of_path(path)


def _of_path(source: str) -> Iterator[Path | Refused]:
    try:
        is_folder = os.path.isdir(source)
    except ValueError:  # a NUL in the name
        is_folder = False
    if not is_folder:
        yield Path(source)
        return
    found = 0
    for item in _of_folder(Path(source), set()):
        found += 1
        yield item
    if not found:
        yield Refused(source, ValueError("the folder has no images"))


def _of_folder(folder: Path, entered: set[Path]) -> Iterator[Path | Refused]:
    """Files first, then folders, each sorted; links are followed, but no folder is entered twice."""
    try:
        real = folder.resolve()
        if real in entered:
            return
        entered.add(real)
        entries = sorted(
            (entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name
        )
    except OSError as error:
        yield Refused(str(folder), error)
        return
    inner = []
    for entry in entries:
        path = folder / entry.name
        try:
            if entry.is_dir():
                inner.append(path)
            elif path.suffix.lower() in PICTURE_SUFFIXES and entry.is_file():
                yield path
        except OSError as error:  # a link in a circle, or into a folder that may not be read
            yield Refused(str(path), error)
    for path in inner:
        yield from _of_folder(path, entered)


def problem_of(prediction: Prediction) -> str:
    """Why an image has no answer, in one line without its name."""
    error, name = prediction.error, str(name_of(prediction))
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    named = f"'{printable(name, NAMED_LETTERS)}': "  # as `open_image` names it
    return printable(text.rpartition(named)[2])


def name_of(prediction: Prediction) -> str:
    """The image's name as it was given."""
    return prediction.image if isinstance(prediction.image, str) else str(prediction.image)


class TextWriter:
    """A line an image, `path: 98.1% Avocado, 1.0% Pear`; a block of lines where there is only one image."""

    def __init__(self, to: TextIO, is_only: bool) -> None:
        self.to, self.is_only = to, is_only

    def write(self, prediction: Prediction, found: Found) -> None:
        """Writes what was found, or the problem."""
        path = printable(name_of(prediction), PATH_LETTERS)
        classes = [(f"{probability:.1%}", printable(name)) for name, probability in found]
        if prediction.error is not None:
            self.to.write(f"{path}: error: {problem_of(prediction)}\n")
        elif self.is_only:
            self.to.write("".join([f"{path}\n", *(f"  {share:>6}  {name}\n" for share, name in classes)]))
        else:
            self.to.write(f"{path}: {', '.join(f'{share} {name}' for share, name in classes)}\n")


class JsonWriter:
    """A JSON object a line: {"image", "predictions": [{"class", "probability"}, ...]}, or {"image", "error"}."""

    def __init__(self, to: TextIO) -> None:
        self.to = to

    def write(self, prediction: Prediction, found: Found) -> None:
        """Writes what was found, or the problem."""
        line: dict[str, Any] = {"image": name_of(prediction)}
        if prediction.error is not None:
            line["error"] = problem_of(prediction)
        else:
            line["predictions"] = [{"class": name, "probability": round(share, 6)} for name, share in found]
        self.to.write(json.dumps(line) + "\n")


class CsvWriter:
    """A row an image: image, class_1, probability_1, class_2, ..., error."""

    def __init__(self, to: TextIO, top: int) -> None:
        self.rows, self.top, self.on_terminal = csv.writer(to, lineterminator="\n"), top, to.isatty()
        ranks = range(1, top + 1)
        self.rows.writerow(
            ["image", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability")), "error"]
        )

    def write(self, prediction: Prediction, found: Found) -> None:
        """Writes what was found, or the problem."""
        cells = [cell for name, share in found for cell in (name, f"{share:.6f}")] or [""] * (2 * self.top)
        row = [name_of(prediction), *cells, problem_of(prediction) if prediction.error is not None else ""]
        self.rows.writerow([printable(cell, PATH_LETTERS) if self._is_unfit(cell) else cell for cell in row])

    def _is_unfit(self, cell: str) -> bool:
        """Whether it could do something to a terminal, or is no valid Unicode."""
        return self.on_terminal or any("\ud800" <= letter <= "\udfff" for letter in cell)


def write_predictions(
    classifier: Classifier, images: Iterable[Any], to: TextIO, form: str = "text", top: int = 5, threads: int = 0
) -> tuple[int, int]:
    """Classifies images and writes each result at once; how many there were, and how many had no answer.

    form: "text", "json" or "csv".
    """
    images = iter(images)
    first = list(islice(images, 2))
    top = min(top, len(classifier.classes))
    writer = {
        "text": lambda: TextWriter(to, len(first) == 1),
        "json": lambda: JsonWriter(to),
        "csv": lambda: CsvWriter(to, top),
    }[form]()
    count = failed = 0
    for prediction in classifier.stream(chain(first, images), threads):
        count += 1
        failed += prediction.error is not None
        writer.write(prediction, [] if prediction.error else classifier.best(prediction.probabilities, top))
        to.flush()
    return count, failed


def run(arguments: argparse.Namespace) -> int:
    """Predicts as `arguments` say; the exit status: 1 where an image had no answer, else 0.

    Raises:
        ValueError: nothing to read, a bad argument or checkpoint. OSError: the output cannot be written.
    """
    require(arguments.top >= 1, "predict", "top", "at least 1", arguments.top)
    require(arguments.workers >= 0, "predict", "workers", "at least 0", arguments.workers)
    require(bool(arguments.images or arguments.list), "predict", "images", "given: files, folders, lists or -", [])
    form = "json" if arguments.json else "csv" if arguments.csv else "text"
    given = {name: getattr(arguments, name) for name in ("device", "precision", "batch_size")}
    check_output(arguments.output, form, [*arguments.images, *arguments.list])
    classifier = load(arguments.checkpoint, **given)
    images = find_images(arguments.images, arguments.list)
    with _opened(arguments.output) as to:
        count, failed = write_predictions(classifier, images, to, form, arguments.top, arguments.workers)
    if count == 0:
        raise ValueError("predict: the lists must name images; got none")
    if failed:
        print(f"ffvt predict: {failed} of {count} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def check_output(output: str, form: str, sources: Iterable[str]) -> None:
    """Refuses an output that would cost another file or has no folder, before any work.

    form: "text", "json" or "csv"; a file that is there must be empty, or hold earlier answers in it.
    sources: images and lists, as `find_images` takes them.

    Raises:
        ValueError, FileNotFoundError: `output` is named in the message.
    """
    if not output:
        return
    path = Path(output)
    is_file = path.suffix.lower() not in PICTURE_SUFFIXES and not path.is_dir()
    require(is_file, "predict", "output", "a text file, no image and no folder", output)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"predict: the folder of output must exist; got output={printable(repr(output))}")
    if path.is_file():
        is_read = any(os.path.exists(name) and path.samefile(name) for name in (s.removeprefix("@") for s in sources))
        require(not is_read, "predict", "output", "none of the images and lists", output)
        with path.open("rb") as file:
            start = file.read(ANSWERS_START)
        is_old = not start or re.match(ANSWERS[form], start) is not None
        require(is_old, "predict", "output", f"new or earlier answers as {form}, other files stay", output)


def _opened(output: str) -> AbstractContextManager[TextIO]:
    """The output file, or standard output."""
    return open(output, "w", encoding="utf-8", newline="") if output else nullcontext(sys.stdout)
