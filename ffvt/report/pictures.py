"""Pictures for people: training curves, hit rates per layer, and what each layer picked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ffvt.report.picks import PatchGrid

matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

ACCENT, QUIET, MARK = "#c2410c", "#94a3b8", "#84cc16"
CAPTION_COLOURS = {True: "#15803d", False: "#b91c1c", None: "#0f172a"}
DIMMED = 0.5  # brightness of what was not picked


def training_curve(log: Sequence[dict[str, Any]], ceiling: float) -> Figure:
    """Training loss and test accuracy over the steps, from the lines of a run's log; the coarse-only ceiling dashed."""
    training = [(line["step"], line["loss"]) for line in log if line["kind"] == "train"]
    tests = [(line["step"], line["top1"]) for line in log if line["kind"] == "evaluate"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*training), color=ACCENT)
    left.set(title="Training loss", xlabel="optimiser step", ylim=(0, None))
    right.plot(*zip(*tests), color=ACCENT, marker="o", markersize=4)
    right.axhline(ceiling, color=QUIET, linestyle="--")
    right.annotate(
        "best possible from colour alone",
        (1, ceiling),
        (0, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#64748b",
    )
    right.set(title="Test accuracy", xlabel="optimiser step", ylim=(0, 1))
    right.yaxis.set_major_formatter("{x:.0%}")
    return figure


def hit_rate_bars(rates: Sequence[float], random_rate: float, noun: str = "layer") -> Figure:
    """One bar per selecting layer, or head: the share of its picks that lie on the mark; random picks dashed."""
    figure = Figure(figsize=(9, 3.0), layout="constrained")
    axes = figure.subplots()
    layers = [f"{noun} {number}" for number in range(1, len(rates) + 1)]
    bars = axes.bar(layers, rates, color=ACCENT, width=0.55)
    axes.bar_label(bars, [f"{rate:.0%}\n{rate / random_rate:.1f}x" for rate in rates], padding=3)
    axes.axhline(random_rate, color=QUIET, linestyle="--")
    axes.annotate(
        f"random picks\n{random_rate:.1%}",
        (1, random_rate),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color="#64748b",
    )
    axes.set(title="Share of the selected patches that lie on the mark", ylim=(0, max(*rates, random_rate) * 1.3))
    axes.yaxis.set_major_formatter("{x:.0%}")
    return figure


def selection_grid(
    images: Sequence[Tensor],
    index: Tensor,
    patches: PatchGrid,
    captions: Sequence[tuple[str, bool | None]],
    boxes: Sequence[tuple[int, int, int, int]] | None = None,
    other: str = "class token",
    titles: Sequence[str] | None = None,
) -> Figure:
    """A row per image: the picture, then for each layer the same with all but the picked patches dimmed.

    images: uint8 (3, S, S) each; index: (B, L-1, K), 0 for what is no patch; patches: where they lie, in pixels of the
    images; captions: text, and whether it is right (None where nobody knows); boxes: the mark, outlined in the first
    column; other: what 0 stands for, which a layer that picked it says; titles: of the panels, "layer 1", ... if None.
    """
    rows, layers = index.shape[:2]
    titles = titles or [f"layer {number}" for number in range(1, layers + 1)]
    figure = Figure(figsize=(2.1 * (layers + 1), 2.3 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, layers + 1, squeeze=False)
    for row, (image, (text, good)) in enumerate(zip(images, captions)):
        pixels = image.permute(1, 2, 0).numpy()
        grid[row, 0].imshow(pixels)
        grid[row, 0].set_title(text, fontsize=10, color=CAPTION_COLOURS[good], parse_math=False)  # "$" is no formula
        if boxes:
            _outline(grid[row, 0], boxes[row], MARK)
        for layer in range(layers):
            axes, picks = grid[row, layer + 1], index[row, layer].tolist()
            axes.imshow(_dim_unpicked(pixels, picks, patches))
            for pick in picks:
                if pick > 0:
                    _outline(axes, patches.box(pick), ACCENT)
            title = titles[layer] if row == 0 else ""
            axes.set_title(title + (f" + {other}" if 0 in picks else ""), fontsize=10, color="#475569")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _dim_unpicked(pixels: np.ndarray, picks: Sequence[int], patches: PatchGrid) -> np.ndarray:
    weight = np.full(pixels.shape[:2], DIMMED)
    for pick in picks:
        if pick > 0:
            x0, y0, x1, y1 = map(round, patches.box(pick))
            weight[y0:y1, x0:x1] = 1.0
    return (pixels * weight[..., None]).astype(np.uint8)


def _outline(axes: Any, box: tuple[float, float, float, float], colour: str) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.8))
