"""The Triton kernel of attention_vecmat: tile edges, column blocks, any weights, infinite logits, repeats."""

import pytest
import torch

import ffvt
from tests.helpers import heads

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import tuning
from ffvt.kernels.backend_triton import attention_stats_forward, attention_vecmat_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
SMALL = tuning.Tiling(tuning.ANY, 4, 128, 32, 16, 4, 1, "tests: several blocks, and a tail of its own")
SHAPES = [(2, 16), (3, 32), (17, 64), (65, 80), (100, 96), (130, 128), (66, 7)]  # N, D


@pytest.fixture(autouse=True)
def _on_device():
    with torch.device(DEVICE):
        yield


def inputs(tokens, head_dim, dtype=torch.float32):
    """Two images of two heads: weights of both signs, and q and k as strided views of one packed tensor."""
    q, k, _ = (1.5 * torch.randn(2, tokens, 3, 2, head_dim)).to(dtype).unbind(2)
    return torch.randn(2, 2, tokens), q, k


def true_map(q, k, scale):
    """(B, H, N, N) in fp64."""
    return (scale * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())).softmax(-1)


def times(weights, probs):
    return (weights.to(probs.dtype).unsqueeze(-2) @ probs).squeeze(-2)


def assert_is_product(found, weights, probs):
    """Each number is right to 1e-5 of the sum of its terms' magnitudes."""
    assert found.dtype == torch.float32
    excess = (found.double() - times(weights, probs)).abs() - 1e-5 * times(weights.abs(), probs)
    assert excess.max() <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
def test_the_shipped_tiles_agree_with_the_truth_and_two_runs_to_the_bit(tokens, head_dim, dtype):
    weights, q, k = inputs(tokens, head_dim, dtype)
    scale = head_dim**-0.5
    lse = attention_stats_forward(q, k, k, scale)[3]
    found = attention_vecmat_forward(weights, q, k, lse, scale)
    assert_is_product(found, weights, true_map(q, k, scale))
    assert torch.equal(attention_vecmat_forward(weights, q, k, lse, scale), found)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 32, 33, 34, 49, 65, 81])
def test_every_tile_edge_is_right(monkeypatch, tokens):
    for kernel in ("log_sum_exp", "vecmat"):
        monkeypatch.setitem(tuning.TABLES, kernel, (SMALL,))
    weights, q, k = inputs(tokens, 20)
    found = attention_vecmat_forward(weights, q, k, None, 0.3)
    assert_is_product(found, weights, true_map(q, k, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_lse_left_to_the_kernel_is_that_of_the_statistics(dtype):
    weights, q, k = inputs(100, 80, dtype)
    lse = attention_stats_forward(q, k, k, 0.1)[3]
    with_lse, without = (attention_vecmat_forward(weights, q, k, given, 0.1) for given in (lse, None))
    torch.testing.assert_close(with_lse, without, rtol=1e-5, atol=1e-6)


def test_any_lse_is_followed():
    weights, q, k = inputs(70, 16)
    lse = torch.randn(2, 2, 70)
    logits = 0.25 * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    found = attention_vecmat_forward(weights, q, k, lse, 0.25)
    assert_is_product(found, weights, (logits - lse.double().unsqueeze(-1)).exp())


def test_strides_change_no_bit():
    weights, q, k = inputs(67, 32)
    found = attention_vecmat_forward(weights, q, k, None, 0.2)
    assert torch.equal(found, attention_vecmat_forward(weights, q.contiguous(), k.contiguous(), None, 0.2))
    wide = [t[:1].expand(3, -1, -1, -1) for t in (q, k)]  # batch stride 0
    many = attention_vecmat_forward(weights[:1].repeat(3, 1, 1), *wide, None, 0.2)
    assert torch.equal(many, found[:1].expand(3, -1, -1))


@pytest.mark.parametrize("token", [0, 1, 64, 65, 99])
def test_a_single_one_reads_a_row_of_the_map(token):
    weights, q, k = inputs(100, 16)
    weights = torch.zeros_like(weights)
    weights[..., token] = 1.0
    found = attention_vecmat_forward(weights, q, k, None, 0.25)
    torch.testing.assert_close(found.double(), true_map(q, k, 0.25)[:, :, token], rtol=1e-5, atol=0)


def test_ones_add_up_columns_and_a_sign_passes_through():
    weights, q, k = inputs(100, 16)
    received = attention_vecmat_forward(torch.ones_like(weights), q, k, None, 0.25)
    torch.testing.assert_close(received.double(), true_map(q, k, 0.25).sum(-2), rtol=1e-5, atol=0)
    found = attention_vecmat_forward(weights, q, k, None, 0.25)
    assert torch.equal(attention_vecmat_forward(-weights, q, k, None, 0.25), -found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity on purpose, in the interpreter's NumPy
@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
@pytest.mark.parametrize("token", [0, pytest.param(40, marks=pytest.mark.slow), 99])
def test_a_weight_that_is_no_number_reaches_its_own_head_alone(weight, token):
    weights, q, k = inputs(100, 16)
    clean = attention_vecmat_forward(weights, q, k, None, 0.25)
    weights[1, 0, token] = weight
    found = attention_vecmat_forward(weights, q, k, None, 0.25)
    torch.testing.assert_close(found[1, 0], torch.full_like(found[1, 0], weight), equal_nan=True)
    found[1, 0] = clean[1, 0]
    assert torch.equal(found, clean)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("first", [0, 1])
def test_keys_of_infinite_logits_receive_nothing_and_harm_no_other(first):
    """In the masked last step the rows that do not exist are zeros, whose product with such a key is no number."""
    q, k, _ = (t.detach().abs() for t in heads((1, 100, 2, 16)))
    k[:, first:70] = -torch.inf
    weights = torch.rand(1, 2, 100)
    lse = (0.25 * torch.einsum("bnhd,bmhd->bhnm", q, k)).logsumexp(-1)
    for given in (lse, None):
        found = attention_vecmat_forward(weights, q, k, given, 0.25)
        assert (found[..., first:70] == 0).all()
        torch.testing.assert_close(found.sum(-1), weights.sum(-1), rtol=1e-5, atol=0)


def test_no_image_gives_no_numbers():
    weights, q, k = (t[:0] for t in inputs(9, 16))
    with ffvt.use_backend("triton"):
        assert ffvt.attention_vecmat(weights, q, k).shape == (0, 2, 9)
