"""The table of block sizes: what a configuration depends on, that every row is used, and the grid."""

import math

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import tuning

ARCHITECTURES = ("interpreter", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "sm_120")
SMALL = tuning.Tiling(tuning.ANY, 4, 128, 32, 16, 4, 1, "tests")


@pytest.mark.parametrize("kernel", tuning.TABLES)
def test_every_row_of_the_table_can_be_reached_and_says_why(kernel):
    reached = {
        tuning.find_tiling(kernel, arch, size, dim)
        for arch in ARCHITECTURES
        for size in (2, 4)
        for dim in range(1, 129)
    }
    assert reached == set(tuning.TABLES[kernel])
    assert all(tiling.reason for tiling in reached)


@pytest.mark.parametrize("kernel", tuning.TABLES)
def test_an_override_holds_inside_and_ends_with_it(kernel):
    shipped = tuning.attention_config(kernel, "sm_90", 4, 64)
    with tuning.override(kernel, SMALL):
        assert tuning.attention_config(kernel, "sm_90", 4, 64) == tuning.tiling_config(kernel, SMALL) != shipped
    assert tuning.attention_config(kernel, "sm_90", 4, 64) == shipped


def test_a_new_number_of_tokens_or_picks_compiles_no_selection_below_the_next_power_of_two():
    selections = {str(tuning.select_config("sm_90", n, k)) for n in range(513, 1025) for k in (9, 12, 16)}
    assert len(selections) == 1


@pytest.mark.parametrize(
    ("num_tokens", "block", "warps"),
    [(1, 16, 1), (17, 32, 1), (257, 512, 2), (785, 1024, 4), (1024, 1024, 4), (4097, 8192, 16), (8192, 8192, 16)],
)
def test_a_head_s_lines_lie_in_one_program(num_tokens, block, warps):
    assert tuning.lines_config(num_tokens) == tuning.Config({"BLOCK": block}, {"num_warps": warps})


@pytest.mark.parametrize("num_tokens", [1, 2, 32, 33, 34, 64, 65])
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [("forward", 32), ("query_gradient", 32), ("log_sum_exp", 32), ("key_gradient", 16), ("vecmat", 16)],
)
def test_the_grid_covers_every_patch_once_and_each_class_token(kernel, tile, num_tokens):
    programs = tuning.tiling_config(kernel, SMALL).grid(num_tokens, 3)
    assert programs == (3 * (math.ceil((num_tokens - 1) / tile) + 1),)
