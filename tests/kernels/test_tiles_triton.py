"""Tiles of the Triton kernels: how a head dimension is cut, and how far a tensor reaches."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels.tiles_triton import block_widths, extent, is_padded

WIDTHS = {
    **{1: (16,), 16: (16,), 32: (32,), 48: (32, 16), 64: (64,)},
    **{72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128,)},
}


@pytest.mark.parametrize(("head_dim", "widths"), WIDTHS.items())
def test_head_dimensions_are_not_padded_to_the_next_power_of_two(head_dim, widths):
    assert block_widths(head_dim) == widths


@pytest.mark.parametrize("head_dim", range(1, 129))
def test_only_the_last_column_block_is_padded_and_only_where_it_must_be(head_dim):
    padded = [is_padded(head_dim, block) for block in range(len(block_widths(head_dim)))]
    assert padded == [False] * (len(padded) - 1) + [sum(block_widths(head_dim)) > head_dim]


def test_the_extent_counts_gaps_between_rows_and_repeats_of_a_broadcast():
    assert extent(torch.empty(2, 5, 3, 4)) == 60
    assert extent(torch.empty(2, 5, 3, 3, 4).select(2, 1)) == 4 * 36 + 2 * 4 + 3
    assert extent(torch.empty(2, 1, 3, 4).expand(2, 5, 3, 4)) == 60
