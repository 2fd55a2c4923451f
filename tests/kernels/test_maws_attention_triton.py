"""The Triton attention kernels: tile edges, the head's column blocks, extreme logits, strides of zero."""

import pytest
import torch

import ffvt
from tests.helpers import explicit, heads, rms, truth

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
SMALL = tuning.Tiling(tuning.ANY, 4, 128, 32, 16, 4, 1, "tests: several blocks, and a tail of its own")


@pytest.fixture(autouse=True)
def _on_triton():
    with torch.device(DEVICE), ffvt.use_backend("triton"):
        yield


@pytest.mark.parametrize(
    ("tokens", "head_dim"), [*((tokens, 20) for tokens in (1, 2, 16, 17, 33, 50, 65, 81)), (2, 72), (17, 72), (33, 72)]
)
def test_values_and_gradients_agree_with_the_truth_around_every_tile_edge(monkeypatch, tokens, head_dim):
    for kernel in tuning.TABLES:
        monkeypatch.setitem(tuning.TABLES, kernel, (SMALL,))
    q, k, v = heads((1, tokens, 2, head_dim))
    out, _, score = ffvt.maws_attention(q, k, v, min(4, tokens))
    expected, expected_score = truth(q, k, v, head_dim**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.double(), expected_score, rtol=2e-5, atol=0)
    grad = torch.randn_like(out)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    theirs = torch.autograd.grad(truth(*wide, head_dim**-0.5)[0], wide, grad.double())
    for mine, true in zip(torch.autograd.grad(out, (q, k, v), grad), theirs):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [0.01, 0.7, 3.0])
def test_any_positive_scale_is_right(scale):
    q, k, v = heads((1, 39, 2, 16))
    out = ffvt.maws_attention(q, k, v, 3, scale=scale)[0]
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = truth(*wide, scale)[0]
    assert rms(out, expected) <= 2 * rms(explicit(q, k, v, scale), expected) + 1e-7
    for mine, true in zip(found, torch.autograd.grad(expected, wide, grad.double())):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


def test_a_broadcast_gradient_and_batch_are_right():
    q, k, v = (t.detach() for t in heads((1, 21, 2, 16)))
    wide = [t.expand(3, -1, -1, -1).requires_grad_() for t in (q, k, v)]  # batch stride 0
    single = [t.clone().requires_grad_() for t in (q, k, v)]
    many = torch.autograd.grad(ffvt.maws_attention(*wide, 2)[0].sum(), wide)  # a gradient of stride 0
    one = torch.autograd.grad(ffvt.maws_attention(*single, 2)[0].sum(), single)
    for mine, theirs in zip(many, one):
        assert torch.equal(mine, theirs.expand_as(mine))


def infinite_keys(class_key):
    """q, k, v of 100 tokens, where the keys 1 to 69, more than the first block, are of infinitely small logits."""
    q, k, v = (t.detach() for t in heads((1, 100, 2, 16)))
    k[:, 1:70] = -torch.inf
    k[:, 0] = class_key
    return q.abs(), k, v


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity on purpose, in the interpreter's NumPy
@pytest.mark.parametrize("class_key", [0.1, -torch.inf])
def test_keys_of_infinite_logits_weigh_nothing(class_key):
    q, k, v = infinite_keys(class_key)
    found, _, score = ffvt.maws_attention(q, k, v, 3)
    expected, _, expected_score = ffvt.reference.maws_attention(q, k, v, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(score, expected_score, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradients_beside_keys_of_infinite_logits_are_those_of_the_reference():
    q, k, v = infinite_keys(-torch.inf)
    k, v = k.requires_grad_(), v.requires_grad_()
    grads = torch.autograd.grad(ffvt.maws_attention(q, k, v, 3)[0].square().sum(), (k, v))
    with ffvt.use_backend("reference"):
        theirs = torch.autograd.grad(ffvt.maws_attention(q, k, v, 3)[0].square().sum(), (k, v))
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-4)
