"""`ffvt plot`: several training runs in one picture, and in one table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from ffvt.report.page import png
from ffvt.report.pictures import QUIET
from ffvt.report.runs import Run, read_runs

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
COLUMNS = 3
SMOOTHED_FROM = 60  # points of a line, from which on a mean is drawn over it


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Loss, accuracy, rates, speed and what the layers picked, over the steps; one colour a run, no empty panel.

    Raises:
        ValueError: no run has trained a step.
    """
    panels = [panel for panel in PANELS if any(panel[1](run) for run in runs)]
    if not panels:
        raise ValueError(f"plot: a run must have trained; got nothing to draw in {', '.join(run.name for run in runs)}")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    legend_rows = -(-len(runs) // columns)
    height = 2.9 * rows + 0.25 * legend_rows + 0.3
    figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, series, style) in zip(grid.flat, panels):
        axes.set(title=title, xlabel="optimiser step")
        for number, run in enumerate(runs):
            style(axes, run, series(run), _colour(number, len(runs)))
        if style in (_share, _hits):
            axes.set_ylim(bottom=0)  # after all lines are drawn: it ends the automatic choice
            axes.yaxis.set_major_formatter("{x:.0%}")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [grid.flat[0].plot([], [], color=_colour(i, len(runs)), label=run.name)[0] for i, run in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _colour(number: int, count: int) -> Any:
    return COLOURS[number] if count <= len(COLOURS) else colormaps["viridis"](number / max(1, count - 1))


def _line(axes: Any, run: Run, points: list[tuple[int, float]], colour: Any) -> None:
    """A line; where it has many points, drawn faint under its running mean."""
    if not points:
        return
    steps, values = zip(*points)
    if len(points) < SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, marker="o" if len(points) == 1 else None, markersize=4)
        return
    width = len(points) // 20
    means = [statistics.fmean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=colour)


def _accuracy(axes: Any, run: Run, points: list[tuple[int, float]], colour: Any) -> None:
    """Evaluations, the best marked; those of a split that only the end is reported on as diamonds."""
    final = [(line["step"], line["top1"]) for line in run.lines if line["kind"] == "evaluate" and line.get("model")]
    during = [point for point in points if point not in final]
    for some, marker, style in ((during, "o", "-"), (final, "D", "")):
        if some:
            axes.plot(*zip(*some), color=colour, marker=marker, markersize=4, linestyle=style)
    if during:
        best = max(during, key=lambda point: point[1])
        axes.plot(*best, marker="*", markersize=13, color=colour, markeredgecolor="white")
    axes.yaxis.set_major_formatter("{x:.0%}")


def _hits(axes: Any, run: Run, points: list[tuple[int, float]], colour: Any) -> None:
    """Hit rate; what random picks would give dashed."""
    _line(axes, run, points, colour)
    chance = run.series("evaluate", "selection.random_hit_rate")
    if points and chance:
        axes.plot(*zip(*chance), color=QUIET, linestyle="--", linewidth=1)


def _share(axes: Any, run: Run, points: list[tuple[int, float]], colour: Any) -> None:
    """A line of shares, from 0 on."""
    _line(axes, run, points, colour)


def _exact(axes: Any, run: Run, points: list[tuple[int, float]], colour: Any) -> None:
    """A line that nothing is to be smoothed of."""
    if points:
        axes.plot(*zip(*points), color=colour)


def _of(kind: str, key: str) -> Callable[[Run], list[tuple[int, float]]]:
    return lambda run: run.series(kind, key, **({"model": None} if key.startswith("selection.") else {}))


PANELS: list[tuple[str, Callable[[Run], list[tuple[int, float]]], Callable[..., None]]] = [
    ("Training loss", _of("train", "loss"), _line),
    ("Top-1 (star: best; diamond: final split)", _of("evaluate", "top1"), _accuracy),
    ("Learning rate", _of("train", "lr"), _exact),
    ("Images per second", _of("train", "images_per_second"), _line),
    ("Share of the matmul rate (MFU)", _of("train", "mfu"), _share),
    ("Layers that pick the class token", _of("evaluate", "selection.class_token_rate"), _share),
    ("Picks that the next layer picks too", _of("evaluate", "selection.layer_overlap"), _share),
    ("Picks on the object (dashed: random)", _of("evaluate", "selection.hit_rate"), _hits),
]


def summary_table(runs: Sequence[Run]) -> str:
    """One line a run, for a terminal: steps, last and best top-1, speed, the last statistics of the picks."""
    header = ("run", "steps", "last top-1", "best top-1", "images/s", "class token", "overlap", "hit rate")
    rows = [header, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def _row(run: Run) -> tuple[str, ...]:
    steps = [line["step"] for line in run.lines if line["kind"] == "train"]
    speeds = [value for _, value in run.series("train", "images_per_second")]
    end = next((line for line in reversed(run.lines) if line["kind"] == "end"), None)
    tops = [value for _, value in run.series("evaluate", "top1")]
    last, best = (end["last"]["top1"], end["best"]["top1"]) if end else (tops[-1:], [max(tops)] if tops else [])
    shares = [run.series("evaluate", f"selection.{key}") for key in ("class_token_rate", "layer_overlap", "hit_rate")]
    return (
        run.name,
        str(max(steps, default=0)),
        *(
            f"{value:.4f}" if isinstance(value, float) else f"{value[0]:.4f}" if value else "-"
            for value in (last, best)
        ),
        f"{statistics.median(speeds):.1f}" if speeds else "-",
        *(f"{share[-1][1]:.1%}" if share else "-" for share in shares),
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the picture and prints the table."""
    runs = read_runs(arguments.runs)
    figure = png(comparison_figure(runs))
    Path(arguments.output).write_bytes(figure)
    print(summary_table(runs))
    print(arguments.output)
