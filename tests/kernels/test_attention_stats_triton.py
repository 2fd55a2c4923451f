"""attention_stats in Triton: the lines' softmax beside the attention, which stays that of maws_attention."""

import pytest
import torch

from tests.helpers import heads

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels.backend_triton import attention_stats_forward, maws_attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
SHAPES = [(1, 16), (2, 16), (16, 32), (17, 64), (66, 7), (100, 80), (257, 16)]  # N, D


@pytest.fixture(autouse=True)
def _on_device():
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
def test_the_lines_are_the_softmax_of_the_truth_and_the_rest_is_maws_attention_to_the_bit(tokens, head_dim, dtype):
    q, k, v = (1.5 * torch.randn(2, tokens, 3, 2, head_dim)).to(dtype).unbind(2)
    scale = head_dim**-0.5
    out, row, column, lse, row_max = attention_stats_forward(q, k, v, scale)
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    for found, line in ((row, logits[:, :, 0]), (column, logits[..., 0])):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), line.softmax(-1), rtol=1e-5, atol=1e-9)
    theirs = maws_attention_forward(q, k, v, 1, scale, 0)
    assert all(torch.equal(a, b) for a, b in zip((out, lse, row_max), (theirs[0], *theirs[3:])))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity on purpose, in the interpreter's NumPy
def test_infinite_logits_weigh_nothing_and_a_line_of_them_alone_is_no_distribution():
    q, k, v = (t.detach().abs() for t in heads((1, 40, 2, 16)))
    k[:, 1:30] = -torch.inf
    k[:, 0, 1] = -torch.inf
    row, column = attention_stats_forward(q, k, v, 0.25)[1:3]
    assert (row[..., 1:30] == 0).all()
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(column[:, 0].sum(-1), torch.ones(1))
    assert column[:, 1].isnan().all()
