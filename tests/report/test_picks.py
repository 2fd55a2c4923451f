"""What is shown of either kind of selection: the words, the panels, and where the patches lie."""

import pytest
import torch

from ffvt import criteria
from ffvt.report.picks import PatchGrid, noun, panels, patch_grid, reason
from ffvt.report.pictures import selection_grid
from tests.helpers import small_config


def test_every_criterion_has_its_words():
    assert len({criteria.find(name).reason for name in criteria.names()} - {""}) == len(criteria.names())
    assert reason(small_config(criterion="vote:3")) == "votes of the heads"
    assert reason(small_config(head="transfg")) == criteria.psm.reason


def test_layers_have_a_panel_each_and_all_heads_one_together():
    index = torch.arange(12).view(2, 3, 2)
    shown, titles = panels(index, small_config())
    assert torch.equal(shown, index)
    assert titles == ["layer 1", "layer 2", "layer 3"]
    parts, transfg = torch.tensor([[[5], [9], [5]]]), small_config(head="transfg")
    shown, titles = panels(parts, transfg)
    assert shown.tolist() == [[[5, 9, 5]]]
    assert titles == ["parts of 3 heads"]
    assert (noun(small_config()), noun(transfg)) == ("layer", "head")


@pytest.mark.parametrize("stride", [None, 12])
def test_patches_lie_where_the_model_cuts_them(stride):
    grid = patch_grid(small_config(patch_stride=stride))  # 112 pixels, patches of 16
    step = stride or 16
    assert grid == (7 if stride is None else 9, 16, step, 112)
    assert grid.box(1) == (0, 0, 16, 16)
    assert grid.box(grid.columns + 3) == (2 * step, step, 2 * step + 16, step + 16)
    assert grid.times(2).box(2) == (2 * step, 0, 2 * step + 32, 32)


def test_overlapping_patches_are_framed_whole():
    image = torch.full((3, 10, 10), 200, dtype=torch.uint8)
    figure = selection_grid([image], torch.tensor([[[2, 9]]]), PatchGrid(3, 4, 3, 10), [("a bird", None)], titles=["x"])
    panel = figure.axes[1]
    assert panel.get_title() == "x"
    frames = [(*frame.get_xy(), frame.get_width()) for frame in panel.patches]
    assert frames == [(2.5, -0.5, 4), (5.5, 5.5, 4)]
    shown = panel.images[0].get_array()
    assert (shown[:4, 3:7] == 200).all()
    assert (shown[6:, 6:] == 200).all()
    assert (shown[4:6] < 200).all()
