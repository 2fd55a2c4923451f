"""The selection kernel: order, ties and NaN as the reference has them."""

import pytest
import torch

import ffvt

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import maws_select_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
CASES = [(tokens, picks) for tokens in (3, 64, 100, 129) for picks in (1, 13, 100) if picks <= tokens]
LARGE = [pytest.param(1025, picks, marks=pytest.mark.slow) for picks in (1, 13, 100)]


@pytest.mark.parametrize("first_candidate", [0, 2])
@pytest.mark.parametrize(("tokens", "num_select"), [*CASES, *LARGE])
def test_selection_orders_ties_and_nan_as_the_reference(tokens, num_select, first_candidate):
    row = torch.randint(0, 5, (3, 1, tokens), device=DEVICE).float()  # many ties
    row[1, 0, ::3] = torch.nan
    col = torch.zeros_like(row)
    first_candidate = min(first_candidate, tokens - num_select)
    index, score = maws_select_triton.pick(row, col, num_select, first_candidate)
    torch.testing.assert_close(score, ffvt.reference.maws_score(row, col), equal_nan=True)
    assert torch.equal(index.cpu(), ffvt.reference.select_top(score.cpu(), num_select, first_candidate))
