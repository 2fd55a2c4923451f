"""`ffvt evaluate`: a score as a table, as JSON, and class by class, pair by pair and image by image in files."""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ffvt.errors import printable, require
from ffvt.files import write_whole
from ffvt.inference import load
from ffvt.report.output import figure_format, write_figure
from ffvt.report.picks import noun
from ffvt.scoring import ClassScore, Evaluation, evaluate_checkpoint
from ffvt.train.distributed import join_world

WORST = 5  # classes, and confused pairs, that the table names
DIGITS = 6  # of a number in JSON
NAMED = 100  # classes, up to which the axes of a confusion matrix have names
COUNTED = 20  # classes, up to which its cells have numbers
LETTERS = 32  # of a class's name in a table or on an axis

Row = Sequence[str]


def score_table(evaluation: Evaluation, title: str, noun: str = "layer") -> str:
    """The score for people: rates, loss, what the layers (or heads) pick, the worst classes and the most confused
    pairs."""
    score, classes = evaluation.score, evaluation.class_scores()
    right, seen = sum(one.right for one in classes), sum(one.support > 0 for one in classes)
    rates = [
        ("top-1", _percent(score.top1), f"{right} of {score.count} images"),
        ("top-5", _percent(score.top5), ""),
        ("mean over classes", _percent(score.mean_class_top1), f"{seen} of {len(classes)} classes have images"),
        ("loss", f"{score.loss:.4f}", ""),
    ]
    parts = [title, _columns(rates, "<><")]
    if evaluation.unread:
        parts.append(f"{evaluation.unread} images could not be read and are not counted")
    if score.selection is not None:
        picks = score.selection
        named = [
            ("layers that pick the class token", picks.class_token_rate if noun == "layer" else None),
            ("picks that the next layer picks too", picks.layer_overlap if noun == "layer" else None),
            ("picks on the object", picks.hit_rate),
            ("random picks on the object", picks.random_hit_rate),
        ]
        parts.append(_columns([(name, _percent(value)) for name, value in named if value is not None], "<>"))
    worst = sorted((one for one in classes if one.support > one.right), key=lambda one: (one.recall, -one.support))
    if worst:
        rows = [(_short(one.name), f"{one.right} of {one.support}", _percent(one.recall)) for one in worst[:WORST]]
        parts.append(_columns([("worst classes", "right", "recall"), *rows], "<>>"))
        pairs = [(_short(true), _short(predicted), str(count)) for count, true, predicted in confused_pairs(evaluation)]
        parts.append(_columns([("most confused", "taken for", "images"), *pairs[:WORST]], "<<>"))
    return "\n\n".join(parts)


def confused_pairs(evaluation: Evaluation) -> list[tuple[int, str, str]]:
    """(images, true class, predicted class) of every kind of mistake, the most frequent first."""
    matrix = evaluation.confusion().fill_diagonal_(0)
    order = sorted(matrix.nonzero().tolist(), key=lambda pair: -int(matrix[tuple(pair)]))  # stable: then by label
    return [(int(matrix[row, column]), evaluation.classes[row], evaluation.classes[column]) for row, column in order]


def class_table(classes: Sequence[ClassScore]) -> str:
    """Precision, recall, F1 and support of every class, and their means over the classes with images."""
    rows = [
        (_short(one.name), _percent(one.precision), _percent(one.recall), _percent(one.f1), str(one.support))
        for one in classes
    ]
    means = [_percent(_mean_over_classes(classes, key)) for key in ("precision", "recall", "f1")]
    total = ("mean over classes", *means, str(sum(one.support for one in classes)))
    return _columns([("class", "precision", "recall", "F1", "support"), *rows, total], "<>>>>")


def _mean_over_classes(classes: Sequence[ClassScore], key: str) -> float | None:
    """Over the classes with images; the precision of one that is never predicted counts as 0."""
    values = [getattr(one, key) or 0.0 for one in classes if one.support]
    return statistics.fmean(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _short(name: str) -> str:
    return printable(name, LETTERS)


def _columns(rows: Sequence[Row], sides: str) -> str:
    """Rows as aligned columns, each to its side, "<" or ">"."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)).rstrip() for row in rows
    )
    return "\n".join(lines)


def score_json(evaluation: Evaluation, per_class: bool = False) -> dict[str, Any]:
    """The score as a plain dict, rounded; what is 0 / 0 is None. Classes of one name are told apart by "name (2)"."""
    shown = evaluation.score.summary()
    if per_class:
        shown["per_class"] = {}
        for one in evaluation.class_scores():
            facts = {"right": one.right, "count": one.support}
            rates = {"precision": one.precision, "recall": one.recall, "f1": one.f1}
            shown["per_class"][_unused(one.name, shown["per_class"])] = facts | rates
    return _rounded(shown)


def _unused(name: str, taken: dict[str, Any]) -> str:
    number = 2
    fresh = name
    while fresh in taken:
        fresh, number = f"{name} ({number})", number + 1
    return fresh


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def confusion_figure(evaluation: Evaluation) -> Figure:
    """The confusion matrix: a row for each true class, coloured by the fraction that is predicted as the column's."""
    matrix = evaluation.confusion()
    size, names = len(matrix), [_short(name) for name in evaluation.classes]
    side = min(5 + 0.22 * size, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.7, format=lambda value, _: f"{value:.0%}", label="of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"{evaluation.score.top1:.1%} of {evaluation.score.count} right")
    if size <= NAMED:
        axes.set_xticks(range(size), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(size), names, fontsize=7, parse_math=False)
    if size <= COUNTED:
        for row, column in matrix.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour)
    return figure


def confusion_csv(evaluation: Evaluation) -> str:
    """The confusion matrix's counts: a row for each true class, a column for each predicted one."""
    rows = evaluation.confusion().tolist()
    named = ([name, *row] for name, row in zip(evaluation.classes, rows))
    return _csv([["true \\ predicted", *evaluation.classes], *named])


def predictions_csv(evaluation: Evaluation) -> str:
    """A row an image: path, true, predicted, probability, correct; the last three empty where it could not be read."""
    classes, rows = evaluation.classes, [["path", "true", "predicted", "probability", "correct"]]
    columns = (evaluation.true.tolist(), evaluation.predicted.tolist(), evaluation.probability.tolist())
    for index, (true, predicted, probability) in enumerate(zip(*columns)):
        answer = [classes[predicted], f"{probability:.6f}", int(true == predicted)] if predicted >= 0 else ["", "", ""]
        rows.append([evaluation.name(index), classes[true], *answer])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def run(arguments: argparse.Namespace) -> None:
    """Evaluates as `arguments` say, on all ranks; the main one prints and writes.

    Raises:
        ValueError: an argument, the checkpoint or the data set does not fit. OSError: a file cannot be written.
    """
    for name in ("confusion", "predictions"):
        if getattr(arguments, name):
            _check_file(name, getattr(arguments, name))
    require(arguments.workers >= 0, "evaluate", "workers", "at least 0", arguments.workers)
    classifier = load(
        arguments.checkpoint, device="cpu", precision=arguments.precision, batch_size=arguments.batch_size
    )
    same = ("split", "dataset", "data_root", "image_root", "workers", "cache_dir", "skip_bad_images")
    with join_world(arguments.device) as world:
        evaluation = evaluate_checkpoint(classifier, world, **{name: getattr(arguments, name) for name in same})
        dataset = arguments.dataset or classifier.facts["options"]["dataset"]
        title = f"{printable(arguments.checkpoint)} on {arguments.split} of {dataset}"
        world.on_main(lambda: _show(evaluation, title, noun(classifier.model.config), arguments))


def _check_file(name: str, path: str) -> None:
    """Refuses a file that could not be written, before the work."""
    suffix = Path(path).suffix.lower()
    if name == "confusion" and suffix != ".csv":
        figure_format(path, "evaluate")
        return
    require(suffix == ".csv" and not Path(path).is_dir(), "evaluate", name, "a file that ends in .csv", path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"evaluate: the folder of {name} must exist; got {name}={path!r}")


def _show(evaluation: Evaluation, title: str, noun: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(score_json(evaluation, arguments.per_class), allow_nan=False))
    else:
        print(score_table(evaluation, title, noun))
        if arguments.per_class:
            print(f"\n{class_table(evaluation.class_scores())}")
    if arguments.confusion and Path(arguments.confusion).suffix.lower() != ".csv":
        write_figure(confusion_figure(evaluation), arguments.confusion, "evaluate")
    elif arguments.confusion:
        _write_text(arguments.confusion, confusion_csv, evaluation)
    if arguments.predictions:
        _write_text(arguments.predictions, predictions_csv, evaluation)


def _write_text(path: str, of: Callable[[Evaluation], str], evaluation: Evaluation) -> None:
    write_whole(path, of(evaluation).encode("utf-8", "backslashreplace"))  # names may be no valid Unicode
