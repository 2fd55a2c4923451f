"""`ffvt plot`: several training runs in one figure, and in one table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ffvt.report.output import figure_format, write_figure
from ffvt.report.pictures import QUIET
from ffvt.report.runs import Run, number_in, read_runs

# Okabe and Ito's without their yellow, which is too pale on white, and Tol's wine: apart for the colour-blind too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255")
DASHES = ("-", "-.", ":")  # in turn where there are more runs than COLOURS; "--" is for random picks
ROUND = (1, 2, 5, 10)  # steps between ticks
PANEL_WIDTH = 4.2  # inches
LETTERS = 34  # of a run's name, as many as fit in the legend under one panel
SMOOTHED_FROM = 60  # points of a line, from which on a mean is drawn over it
MARKS = 20  # on one line at most

Points = list[tuple[int, float]]
Style = dict[str, Any]  # colour and dashes of a run, the same in all panels


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows.

    Attributes:
        title: over the axes.
        points: of a run.
        draw: draws the runs.
        percent: the axis begins at 0 and counts per cent.
    """

    title: str
    points: Callable[[Run], Points]
    draw: Callable[[Axes, Sequence[tuple[Run, Points, Style]]], None]
    percent: bool = False


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Loss, accuracy, rates, speed and what the layers picked, over the steps; one colour a run, no empty panel.

    Raises:
        ValueError: no run has trained a step.
    """
    panels = [panel for panel in PANELS if any(panel.points(run) for run in runs)]
    if not panels:
        raise ValueError(f"plot: a run must have trained; got nothing to draw in {', '.join(run.name for run in runs)}")
    columns = 4 if len(panels) > 6 else 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height = 2.9 * rows + 0.22 * -(-len(runs) // columns) + 0.3
    figure = Figure(figsize=(PANEL_WIDTH * columns, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = [_style(number, len(runs)) for number in range(len(runs))]
    last = max(step for panel in panels for run in runs for step, _ in panel.points(run))
    for axes, panel in zip(grid.flat, panels):
        panel.draw(axes, [(run, panel.points(run), style) for run, style in zip(runs, styles)])
        axes.set(title=panel.title, xlabel="optimiser step", xlim=(0, 1.04 * max(last, 1)))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
        if panel.percent:
            _count_percent(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _legend(figure, [run.name for run in runs], styles, columns)
    return figure


def _style(number: int, count: int) -> Style:
    if count <= len(COLOURS):
        return {"color": COLOURS[number], "linestyle": "-"}
    # up to 0.9: its end is too pale on white
    return {"color": colormaps["viridis"](0.9 * number / (count - 1)), "linestyle": DASHES[number % len(DASHES)]}


def _count_percent(axes: Axes) -> None:
    """After all is drawn: per cent from 0 on, with room for lines that lie at 0 and at the top."""
    top = max(axes.dataLim.y1, 0) or 1.0
    axes.set_ylim(-0.02 * top, 1.08 * top)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _legend(figure: Figure, names: Sequence[str], styles: Sequence[Style], columns: int) -> None:
    handles = [Line2D([], [], linewidth=2, **style) for style in styles]
    legend = figure.legend(
        handles, ["run"] * len(names), loc="outside lower center", ncols=min(columns, len(names)), frameon=False
    )
    for text, name in zip(legend.get_texts(), names):
        # afterwards, for matplotlib leaves out labels that begin with "_" and takes "$" for a formula
        text.set_parse_math(False)
        text.set_text(name if len(name) <= LETTERS else f"{name[: LETTERS // 2]}…{name[-LETTERS // 2 + 1 :]}")


def _lines(axes: Axes, drawn: Sequence[tuple[Run, Points, Style]], smooth: bool = False) -> None:
    """Lines; to smooth, those of many points are drawn faint under their running mean."""
    for _, points, style in drawn:
        if points:
            steps, values = zip(*points)
            if smooth and len(points) >= SMOOTHED_FROM:
                axes.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8, zorder=1)
                values = _running_mean(values)
            axes.plot(steps, values, marker="o" if len(points) == 1 else None, markersize=5, **style)


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over a tenth of the values, around each; over fewer at the ends."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _accuracy(axes: Axes, drawn: Sequence[tuple[Run, Points, Style]]) -> None:
    """Evaluations: val hollow, others full; the best starred; those that only the end is reported on as diamonds."""
    key: dict[str, Style] = {}  # label -> look, for the legend

    def mark(label: str, points: Points, colour: Any, **look: Any) -> None:
        if points:
            axes.plot(*zip(*points), color=colour, **look)
            key[label] = {name: value for name, value in look.items() if name.startswith("marker")}

    for run, _, style in drawn:
        colour = style["color"]
        for split in dict.fromkeys(line.get("split") for line in run.lines if line["kind"] == "evaluate"):
            during = run.series("evaluate", "top1", split=split, model=None)
            look = {"linestyle": style["linestyle"], "markevery": -(-len(during) // MARKS) or 1}
            hollow = {"markerfacecolor": "white"} if split == "val" else {}
            mark(str(split), during, colour, marker="o", markersize=4, **look, **hollow)
            end = [p for which in ("last", "best") for p in run.series("evaluate", "top1", split=split, model=which)]
            diamond = {"marker": "D", "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.7}
            mark(f"{split}, at the end", end, colour, linestyle="", zorder=4, **diamond)
        best = sorted(run.during("top1"), key=lambda point: -point[1])[:1]
        mark("best", best, colour, linestyle="", zorder=3, marker="*", markersize=13, markeredgecolor="white")
    handles = [
        Line2D([], [], linestyle="", color="#475569", label=label, **key[label])
        for label in sorted(key, key=lambda label: (label == "best", label))
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=8, framealpha=0.8, edgecolor="none", handletextpad=0.2)


def _hits(axes: Axes, drawn: Sequence[tuple[Run, Points, Style]]) -> None:
    """Hit rate; what random picks would give dashed, in grey where all runs have the same."""
    _lines(axes, drawn)
    chances = {}
    for run, points, style in drawn:
        chance = run.during("selection.random_hit_rate")
        if points and chance:
            chances.setdefault(chance[-1][1], style["color"])
    for chance, colour in chances.items():
        axes.axhline(chance, color=colour if len(chances) > 1 else QUIET, linestyle="--", linewidth=1)


def _training(key: str) -> Callable[[Run], Points]:
    return lambda run: run.series("train", key)


def _picks(key: str) -> Callable[[Run], Points]:
    return lambda run: run.during(f"selection.{key}")


PANELS = [
    Panel("Training loss", _training("loss"), partial(_lines, smooth=True)),
    Panel("Top-1", lambda run: run.series("evaluate", "top1"), _accuracy, percent=True),
    Panel("Learning rate", _training("lr"), _lines),
    Panel("Images per second", _training("images_per_second"), partial(_lines, smooth=True)),
    Panel("Share of the matmul rate (MFU)", _training("mfu"), partial(_lines, smooth=True), percent=True),
    Panel("Layers that pick the class token", _picks("class_token_rate"), _lines, percent=True),
    Panel("Picks that the next layer picks too", _picks("layer_overlap"), _lines, percent=True),
    Panel("Picks on the object (dashed: random)", _picks("hit_rate"), _hits, percent=True),
]


def summary_table(runs: Sequence[Run]) -> str:
    """One line a run, for a terminal: steps, last and best top-1 on one split, median speed, the last model's picks."""
    header = ("run", "steps", "split", "last top-1", "best top-1", "images/s", "class token", "overlap", "hit rate")
    rows = [(*header, "random"), *(_row(run) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _row(run: Run) -> tuple[str, ...]:
    steps = [step for kind in ("train", "evaluate") for step, _ in run.series(kind, "step")]
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
        return evaluations[-1].get("split") if evaluations else None, end["last"], number_in(end, "best.top1")
    split = run.chosen_on
    chosen = [line for line in evaluations if line.get("split") == split and not line.get("model")]
    best = max((value for _, value in run.during("top1")), default=None)
    return split, chosen[-1] if chosen else {}, best


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run(arguments: argparse.Namespace) -> int:
    """Writes the figure to `arguments.output`, prints the table of `arguments.runs` and the figure's path; 0.

    Raises:
        ValueError: `output` is no picture, or a run cannot be drawn.
        FileNotFoundError: a log or the folder of `output` is missing.
    """
    figure_format(arguments.output, "plot")
    runs = read_runs(arguments.runs)
    write_figure(comparison_figure(runs), arguments.output, "plot")
    print(summary_table(runs))
    print(arguments.output)
    return 0
