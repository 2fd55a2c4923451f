"""`ffvt plot`: several training runs in one picture, and in one table."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ffvt.report.page import png
from ffvt.report.pictures import QUIET
from ffvt.report.runs import Run, number_in, read_runs

# Okabe and Ito's without their yellow, which is too pale on white, and Tol's wine: apart for the colour-blind too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255")
DASHES = ("-", "-.", ":")  # in turn where there are more runs than COLOURS; "--" is for random picks
ROUND = (1, 2, 5, 10)  # steps between ticks
PANEL_WIDTH = 4.2  # inches
LETTER = 0.085  # inches, of the legend's letters on average
SMOOTHED_FROM = 60  # points of a line, from which on a mean is drawn over it
MARKS = 20  # on one line at most

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Style:
    """How a run is drawn, the same in all panels."""

    colour: Any
    dashes: str


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows. points: of a run; share: of 1, so that the axis begins at 0 and counts per cent."""

    title: str
    points: Callable[[Run], Points]
    draw: Callable[[Axes, Sequence[Run], Panel, Sequence[Style]], None]
    share: bool = False


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Loss, accuracy, rates, speed and what the layers picked, over the steps; one colour a run, no empty panel.

    Raises:
        ValueError: no run has trained a step.
    """
    panels = [panel for panel in PANELS if any(panel.points(run) for run in runs)]
    if not panels:
        raise ValueError(f"plot: a run must have trained; got nothing to draw in {', '.join(run.name for run in runs)}")
    columns = _columns(len(panels))
    rows = -(-len(panels) // columns)
    legend_columns, letters = _legend_shape(runs, PANEL_WIDTH * columns)
    height = 2.9 * rows + 0.22 * -(-len(runs) // legend_columns) + 0.3
    figure = Figure(figsize=(PANEL_WIDTH * columns, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = [_style(number, len(runs)) for number in range(len(runs))]
    last = max(step for panel in panels for run in runs for step, _ in panel.points(run))
    for axes, panel in zip(grid.flat, panels):
        panel.draw(axes, runs, panel, styles)
        axes.set(title=panel.title, xlabel="optimiser step", xlim=(0, 1.04 * max(last, 1)))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
        if panel.share:
            _count_percent(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _legend(figure, runs, styles, legend_columns, letters)
    return figure


def _columns(count: int) -> int:
    """Of panels, such that few places stay empty."""
    if count > 6:
        return 4
    return 2 if count == 4 else min(count, 3)


def _style(number: int, count: int) -> Style:
    if count <= len(COLOURS):
        return Style(COLOURS[number], "-")
    # up to 0.9: its end is too pale on white
    return Style(colormaps["viridis"](0.9 * number / (count - 1)), DASHES[number % len(DASHES)])


def _count_percent(axes: Axes) -> None:
    """After all is drawn: per cent from 0 on, with room for lines that lie at 0 and at the top."""
    top = axes.dataLim.y1
    top = top if top > 0 else 1.0
    axes.set_ylim(-0.02 * top, 1.08 * top)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _legend_shape(runs: Sequence[Run], width: float) -> tuple[int, int]:
    """Columns that the labels fit in, and the letters of a label that fit."""
    longest = max(len(run.name) for run in runs)
    columns = max(1, min(len(runs), int(width / (LETTER * longest + 0.8))))
    return columns, int((width / columns - 0.8) / LETTER)


def _legend(figure: Figure, runs: Sequence[Run], styles: Sequence[Style], columns: int, letters: int) -> None:
    handles = [Line2D([], [], color=style.colour, linestyle=style.dashes, linewidth=2) for style in styles]
    legend = figure.legend(handles, ["run"] * len(runs), loc="outside lower center", ncols=columns, frameon=False)
    for text, run in zip(legend.get_texts(), runs):
        # afterwards, for matplotlib leaves out labels that begin with "_" and takes "$" for a formula
        text.set_parse_math(False)
        text.set_text(_shortened(run.name, letters))


def _shortened(text: str, letters: int) -> str:
    """The start and the end of a text that is too long."""
    half = (letters - 1) // 2
    return text if len(text) <= letters else f"{text[:half]}…{text[-half:]}"


def _lines(axes: Axes, runs: Sequence[Run], panel: Panel, styles: Sequence[Style]) -> None:
    """Lines; where one has many points, drawn faint under its running mean."""
    for run, style in zip(runs, styles):
        points = panel.points(run)
        if len(points) < SMOOTHED_FROM:
            _exact(axes, points, style)
        else:
            steps, values = zip(*points)
            axes.plot(steps, values, color=style.colour, alpha=0.25, linewidth=0.8, zorder=1)
            axes.plot(steps, _running_mean(values), color=style.colour, linestyle=style.dashes)


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over a tenth of the values, around each; over fewer at the ends."""
    reach = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, behind = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[behind] - sums[first]) / (behind - first)


def _exact_lines(axes: Axes, runs: Sequence[Run], panel: Panel, styles: Sequence[Style]) -> None:
    """Lines that nothing is to be smoothed of."""
    for run, style in zip(runs, styles):
        _exact(axes, panel.points(run), style)


def _exact(axes: Axes, points: Points, style: Style) -> None:
    if points:  # one alone makes no line
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points), color=style.colour, linestyle=style.dashes, marker=marker, markersize=5)


def _accuracy(axes: Axes, runs: Sequence[Run], panel: Panel, styles: Sequence[Style]) -> None:
    """Evaluations: val hollow, others full; the best starred; those that only the end is reported on as diamonds."""
    key: dict[str, dict[str, Any]] = {}
    for run, style in zip(runs, styles):
        for split in dict.fromkeys(line.get("split") for line in run.lines if line["kind"] == "evaluate"):
            during = run.series("evaluate", "top1", split=split, model=None)
            if during:
                look = {"marker": "o", "markersize": 4, "markerfacecolor": "white" if split == "val" else style.colour}
                every = -(-len(during) // MARKS)
                axes.plot(*zip(*during), color=style.colour, linestyle=style.dashes, markevery=every, **look)
                key[str(split)] = look
            at_end = [point for which in ("last", "best") for point in _of_model(run, split, which)]
            if at_end:
                look = {"marker": "D", "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.7}
                axes.plot(*zip(*at_end), color=style.colour, linestyle="", zorder=4, **look)
                key[f"{split}, at the end"] = look
        best = max(run.during("top1"), key=lambda point: point[1], default=None)
        if best:
            look = {"marker": "*", "markersize": 13, "markeredgecolor": "white"}
            axes.plot(*best, color=style.colour, linestyle="", zorder=3, **look)
            key["best"] = look
    _key(axes, key)


def _of_model(run: Run, split: str | None, model: str) -> Points:
    return run.series("evaluate", "top1", split=split, model=model)


def _key(axes: Axes, key: dict[str, dict[str, Any]]) -> None:
    """What the marks mean, in grey, where a curve that rises leaves room."""
    grey = "#475569"
    handles = []
    for label, look in sorted(key.items(), key=lambda item: (item[0] == "best", item[0])):
        face = "white" if look.get("markerfacecolor") == "white" else grey
        handles.append(Line2D([], [], linestyle="", color=grey, label=label, **{**look, "markerfacecolor": face}))
    axes.legend(handles=handles, loc="lower right", fontsize=8, framealpha=0.8, edgecolor="none", handletextpad=0.2)


def _hits(axes: Axes, runs: Sequence[Run], panel: Panel, styles: Sequence[Style]) -> None:
    """Hit rate; what random picks would give dashed, in grey where all runs have the same."""
    _exact_lines(axes, runs, panel, styles)
    chances = {}
    for run, style in zip(runs, styles):
        chance = run.during("selection.random_hit_rate")
        if panel.points(run) and chance:
            chances.setdefault(chance[-1][1], style.colour)
    for chance, colour in chances.items():
        axes.axhline(chance, color=colour if len(chances) > 1 else QUIET, linestyle="--", linewidth=1)


def _training(key: str) -> Callable[[Run], Points]:
    return lambda run: run.series("train", key)


def _picks(key: str) -> Callable[[Run], Points]:
    return lambda run: run.during(f"selection.{key}")


PANELS = [
    Panel("Training loss", _training("loss"), _lines),
    Panel("Top-1", lambda run: run.series("evaluate", "top1"), _accuracy, share=True),
    Panel("Learning rate", _training("lr"), _exact_lines),
    Panel("Images per second", _training("images_per_second"), _lines),
    Panel("Share of the matmul rate (MFU)", _training("mfu"), _lines, share=True),
    Panel("Layers that pick the class token", _picks("class_token_rate"), _exact_lines, share=True),
    Panel("Picks that the next layer picks too", _picks("layer_overlap"), _exact_lines, share=True),
    Panel("Picks on the object (dashed: random)", _picks("hit_rate"), _hits, share=True),
]


def summary_table(runs: Sequence[Run]) -> str:
    """One line a run, for a terminal: steps, last and best top-1 on one split, median speed, the last model's picks."""
    header = ("run", "steps", "split", "last top-1", "best top-1", "images/s", "class token", "overlap", "hit rate")
    rows = [(*header, "random"), *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def _row(run: Run) -> tuple[str, ...]:
    steps = [step for kind in ("train", "evaluate") for step in run.steps(kind)]
    speeds = [value for _, value in run.series("train", "images_per_second")]
    split, last, best = _scores(run)
    picks = ("class_token_rate", "layer_overlap", "hit_rate", "random_hit_rate")
    return (
        run.name,
        str(max(steps, default=0)),
        split or "-",
        _shown(number_in(last, "top1"), ".4f"),
        _shown(best, ".4f"),
        _shown(statistics.median(speeds) if speeds else None, ".1f"),
        *(_shown(number_in(last, f"selection.{key}"), ".1%") for key in picks),
    )


def _scores(run: Run) -> tuple[str | None, dict[str, Any], float | None]:
    """The split; the last model's score and the best one's top-1 on it.

    What a finished run reports; of another, the evaluations that it was to choose from: val and test are not mixed.
    """
    evaluations = [line for line in run.lines if line["kind"] == "evaluate"]
    end = next((line for line in reversed(run.lines) if line["kind"] == "end"), {})
    if number_in(end, "last.top1") is not None and number_in(end, "best.top1") is not None:
        split = evaluations[-1].get("split") if evaluations else None
        return split, end["last"], number_in(end, "best.top1")
    split = run.chosen_on
    chosen = [line for line in evaluations if line.get("split") == split and not line.get("model")]
    best = max((value for _, value in run.during("top1")), default=None)
    return split, chosen[-1] if chosen else {}, best


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run(arguments: argparse.Namespace) -> int:
    """Writes the picture, prints the table and the picture's path; 0.

    Raises:
        ValueError: `output` is no PNG, or a run cannot be drawn. FileNotFoundError: a log or the folder of `output` is
        missing.
    """
    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"plot: output must end in .png; got output={str(output)!r}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"plot: the folder of output must exist; got output={str(output)!r}")
    runs = read_runs(arguments.runs)
    _replace(output, png(comparison_figure(runs)))
    print(summary_table(runs))
    print(arguments.output)
    return 0


def _replace(path: Path, content: bytes) -> None:
    """A kill in between leaves the earlier file, never half of the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
