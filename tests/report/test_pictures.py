"""Figures show the numbers that they are given, and the patches that were picked."""

import pytest
import torch
from matplotlib.colors import to_hex

from ffvt.report.picks import PatchGrid
from ffvt.report.pictures import ACCENT, DIMMED, MARK, hit_rate_bars, selection_grid, training_curve


def test_the_curve_shows_losses_tests_and_the_ceiling():
    log = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2)]
    log += [{"kind": "evaluate", "step": 2, "top1": 0.5}, {"kind": "end"}]
    loss, accuracy = training_curve(log, 0.25).axes
    assert list(zip(*loss.lines[0].get_data())) == [(1, 1.0), (2, 0.5)]
    assert list(zip(*accuracy.lines[0].get_data())) == [(2, 0.5)]
    assert list(accuracy.lines[1].get_ydata()) == [0.25, 0.25]


def test_every_layer_has_a_bar_and_random_picks_a_line():
    (axes,) = hit_rate_bars([0.2, 0.4], 0.1).axes
    assert [bar.get_height() for bar in axes.patches] == [0.2, 0.4]
    assert list(axes.lines[0].get_ydata()) == [0.1, 0.1]
    assert "40%\n4.0x" in [text.get_text() for text in axes.texts]


def test_picked_patches_are_framed_and_the_rest_is_dimmed():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    index = torch.tensor([[[1, 4], [0, 2]]])  # one image, two layers, 2 x 2 patches of 4 pixels
    figure = selection_grid([image], index, PatchGrid(2, 4, 4, 8), [("a bird", True)], [(1, 2, 3, 4)])
    first, *layers = figure.axes
    assert first.get_title() == "a bird"
    assert [to_hex(frame.get_edgecolor()) for frame in first.patches] == [MARK]
    assert [axes.get_title() for axes in layers] == ["layer 1", "layer 2 + class token"]
    frames = [[frame.get_xy() for frame in axes.patches] for axes in layers]
    assert frames == [[(-0.5, -0.5), (3.5, 3.5)], [(3.5, -0.5)]]
    assert {to_hex(frame.get_edgecolor()) for axes in layers for frame in axes.patches} == {ACCENT}
    other = selection_grid([image], index, PatchGrid(2, 4, 4, 8), [("a bird", True)], other="no patch").axes[2]
    assert other.get_title() == "layer 2 + no patch"
    shown = layers[1].images[0].get_array()
    assert (shown[:4, 4:] == 200).all()
    assert shown[0, 0, 0] == shown[7, 7, 0] == pytest.approx(200 * DIMMED)
