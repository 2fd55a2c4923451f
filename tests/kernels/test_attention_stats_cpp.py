"""The C++ kernels of attention's statistics: a row vector times the map, and the class token's row and column."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffvt.kernels.backends import _missing

ROOT = Path(__file__).parents[2]
REASON = "; ".join(_missing("cpp"))
if not REASON:
    from ffvt.kernels import backend_cpp
    from ffvt.kernels.backend_cpp import attention_stats_forward, attention_vecmat_forward
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the C++ backend cannot serve: {REASON}")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WITH_LSE = pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])


def packed(shape, dtype=torch.float32):
    """q, k, v (B, N, H, D), views of one packed tensor."""
    batch, tokens, heads, head_dim = shape
    return (1.5 * torch.randn(batch, tokens, 3, heads, head_dim)).to(dtype).unbind(2)


def logits_of(q, k, scale, dtype=torch.float64):
    return scale * (q.to(dtype).transpose(1, 2) @ k.to(dtype).permute(0, 2, 3, 1))


def true_map(q, k, scale):
    """The softmax map (B, H, N, N) and lse (B, H, N) in fp64."""
    logits = logits_of(q, k, scale)
    return logits.softmax(-1), logits.logsumexp(-1)


def vecmat(weights, q, k, scale, lse):
    return attention_vecmat_forward(weights, q, k, None if lse is None else lse.float().contiguous(), scale)


def agree(found, weights, probs, share=1e-5):
    """Each sum to a share of the sum of what is added, signs apart."""
    expected = (weights.double().unsqueeze(-2) @ probs).squeeze(-2)
    allowed = share * (weights.double().abs().unsqueeze(-2) @ probs).squeeze(-2)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= allowed).all(), ((found - expected).abs() / allowed).max()


@DTYPES
@WITH_LSE
@pytest.mark.parametrize("head_dim", [1, 5, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 66, 129, 257, 600])
def test_vecmat_is_the_weights_times_the_map(tokens, head_dim, with_lse, dtype):
    """600 tokens make three groups of queries, and blocks with a rest in each."""
    q, k, _ = packed((2, tokens, 2, head_dim), dtype)
    probs, lse = true_map(q, k, head_dim**-0.5)
    weights = torch.randn(2, 2, tokens)
    agree(vecmat(weights, q, k, head_dim**-0.5, lse if with_lse else None), weights, probs)


@WITH_LSE
def test_many_tokens_take_blocks_of_fewer_queries(with_lse):
    """3,001 keys: what a block may keep of logits is 32 rows of them; and there are more tiles than groups take."""
    q, k, _ = packed((1, 3001, 1, 16))
    probs, lse = true_map(q, k, 0.25)
    weights = torch.rand(1, 1, 3001)
    agree(vecmat(weights, q, k, 0.25, lse if with_lse else None), weights, probs)


@DTYPES
@WITH_LSE
def test_ones_give_the_column_sums_and_a_one_the_row(with_lse, dtype):
    q, k, _ = packed((2, 150, 3, 32), dtype)
    probs, lse = true_map(q, k, 0.2)
    lse = lse if with_lse else None
    ones = vecmat(torch.ones(2, 3, 150), q, k, 0.2, lse)
    torch.testing.assert_close(ones.double(), probs.sum(-2), rtol=1e-5, atol=0)
    torch.testing.assert_close(ones.sum(-1), torch.full((2, 3), 150.0), rtol=1e-5, atol=0)
    one = torch.zeros(2, 3, 150)
    one[..., 77] = 1
    torch.testing.assert_close(vecmat(one, q, k, 0.2, lse).double(), probs[..., 77, :], rtol=1e-5, atol=1e-30)
    assert torch.equal(vecmat(-one, q, k, 0.2, lse), -vecmat(one, q, k, 0.2, lse))
    assert not vecmat(0 * one, q, k, 0.2, lse).any()


def test_any_strides_of_q_and_k_are_read():
    q, k, _ = packed((2, 70, 3, 16))
    wide = torch.empty(3, 2, 70, 40)[..., 5:21].permute(1, 2, 0, 3)
    wide.copy_(k)
    assert not wide.is_contiguous()
    weights = torch.rand(2, 3, 70)
    assert torch.equal(
        vecmat(weights, q.contiguous(), wide, 0.25, None), vecmat(weights, q, k.contiguous(), 0.25, None)
    )


def test_no_image_gives_an_empty_result():
    q = torch.empty(0, 5, 2, 8)
    empty = torch.empty(0, 2, 5)
    assert attention_vecmat_forward(empty, q, q, empty, 1.0).shape == (0, 2, 5)
    assert [tuple(t.shape) for t in attention_stats_forward(q, q, q, 1.0)] == [(0, 5, 2, 8)] + 4 * [(0, 2, 5)]


@DTYPES
@pytest.mark.parametrize("scale", [1e4, 1e9, 1e30, 2e38])
def test_logits_of_any_size_give_the_weight_to_the_largest(scale, dtype):
    q, k, _ = packed((1, 300, 2, 16), dtype)
    weights = torch.rand(1, 2, 300)
    best = logits_of(q, k, 1.0)
    clear = best.topk(2).values.diff().abs().squeeze(-1) > 1e-2  # nearer ones share the weight
    weights = weights * clear
    expected = torch.zeros(1, 2, 300).scatter_add_(-1, best.argmax(-1), weights)
    torch.testing.assert_close(vecmat(weights, q, k, scale, None), expected, rtol=1e-5, atol=1e-20)


@DTYPES
def test_a_given_lse_of_hundreds_costs_the_rounding_of_so_large_logits_alone(dtype):
    q, k, _ = packed((1, 130, 2, 64), dtype)
    probs, lse = true_map(q, k, 4.0)
    assert lse.abs().max() > 200
    agree(vecmat(weights := torch.randn(1, 2, 130), q, k, 4.0, lse), weights, probs, share=2**-21 * lse.max().item())


def test_an_lse_far_too_small_overflows_to_infinity():
    q = torch.zeros(1, 90, 1, 8)
    weights, lse = torch.ones(1, 1, 90), torch.full((1, 1, 90), -100.0)
    assert (vecmat(weights, q, q, 1.0, lse) == torch.inf).all()
    assert (vecmat(-weights, q, q, 1.0, lse) == -torch.inf).all()


UNUSUAL = {
    "an infinite key": ("k", 1, slice(None), torch.inf),
    "a key of minus infinity": ("k", 1, slice(None), -torch.inf),
    "a late infinite key": ("k", -1, slice(None), torch.inf),
    "all keys minus infinity": ("k", slice(None), slice(None), -torch.inf),
    "an infinite query": ("q", 1, slice(None), torch.inf),
    "an infinite component of a query": ("q", 2, 0, torch.inf),
    "an infinite component of a key": ("k", 2, 0, torch.inf),
    "a NaN in a key": ("k", 2, 3, torch.nan),
    "a NaN in a late key": ("k", -1, 3, torch.nan),
    "a NaN in a query": ("q", -1, 3, torch.nan),
    "a NaN among the weights": ("weights", 1, 0, torch.nan),
    "an infinite weight": ("weights", 1, 0, torch.inf),
}


@DTYPES
@WITH_LSE
@pytest.mark.parametrize("signs", ["positive", "mixed"])
@pytest.mark.parametrize("tokens", [4, 300])
@pytest.mark.parametrize(("name", "token", "channel", "value"), UNUSUAL.values(), ids=UNUSUAL)
def test_values_that_are_not_finite_spread_as_in_the_map(name, token, channel, value, tokens, signs, with_lse, dtype):
    draw = torch.randn if signs == "mixed" else torch.rand
    tensors = {key: draw(1, tokens, 1, 8).to(dtype) + 0.1 for key in ("q", "k", "weights")}
    tensors[name][:, token, :, channel] = value
    q, k, weights = tensors["q"], tensors["k"], tensors["weights"][..., 0].float().mT.contiguous()
    logits = logits_of(q, k, 0.5, torch.float32)
    lse = logits.logsumexp(-1)
    expected = (weights.unsqueeze(-2) @ (logits - lse.unsqueeze(-1)).exp()).squeeze(-2)
    found = vecmat(weights, q, k, 0.5, lse if with_lse else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_query_with_an_infinite_and_a_NaN_logit_is_NaN_everywhere():
    q, k = torch.ones(1, 40, 1, 2), torch.ones(1, 40, 1, 2)
    k[0, 3, 0, 0], k[0, 5, 0, 0] = torch.nan, torch.inf
    for lse in (None, torch.full((1, 1, 40), torch.nan)):
        assert vecmat(torch.ones(1, 1, 40), q, k, 1.0, lse).isnan().all()


WRONG = {
    "weights of another length": (dict(weights=torch.ones(1, 2, 6)), ValueError, "weights must be .B, H, N., contig"),
    "strided weights": (dict(weights=torch.ones(1, 2, 10)[..., ::2]), ValueError, "weights must be .B, H, N., contig"),
    "fp64 weights": (dict(weights=torch.ones(1, 2, 5).double()), TypeError, "weights must be fp32"),
    "weights elsewhere": (dict(weights=torch.ones(1, 2, 5, device="meta")), ValueError, "weights must be on the CPU"),
    "an lse of another length": (dict(lse=torch.ones(1, 2, 4)), ValueError, "lse must be .B, H, N., contiguous"),
    "a strided lse": (dict(lse=torch.ones(1, 5, 2).mT), ValueError, "lse must be .B, H, N., contiguous"),
    "an fp16 lse": (dict(lse=torch.ones(1, 2, 5).half()), TypeError, "lse must be fp32"),
    "another k": (dict(k=torch.ones(1, 6, 2, 8)), ValueError, "k must be .B, N, H, D. with the shape of q"),
    "an fp16 k": (dict(k=torch.ones(1, 5, 2, 8).half()), TypeError, "k must have the dtype of q"),
    "a strided k": (dict(k=torch.ones(1, 5, 2, 16)[..., ::2]), ValueError, "k must have unit last stride"),
    "no token": (
        dict(q=torch.ones(1, 0, 2, 8), k=torch.ones(1, 0, 2, 8), weights=torch.ones(1, 2, 0)),
        ValueError,
        "q must have no dimension of zero but B",
    ),
    "a negative scale": (dict(scale=-1.0), ValueError, "scale must be finite and positive in fp32; got scale=-1"),
    "a NaN scale": (dict(scale=torch.nan), ValueError, "scale must be finite and positive in fp32; got scale=nan"),
    "fp64": (
        dict(q=torch.ones(1, 5, 2, 8).double(), k=torch.ones(1, 5, 2, 8).double()),
        NotImplementedError,
        "dtype must be fp16, bf16 or fp32",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_hold_is_refused(changes, error, message):
    good = {"weights": torch.ones(1, 2, 5), "q": torch.ones(1, 5, 2, 8), "k": torch.ones(1, 5, 2, 8), "lse": None}
    with pytest.raises(error, match=message):
        attention_vecmat_forward(*{**good, "scale": 1.0, **changes}.values())


@pytest.mark.parametrize(("name", "value"), [("v", torch.ones(1, 6, 2, 8)), ("scale", 0.0)])
def test_statistics_refuse_what_does_not_hold(name, value):
    good = {**dict.fromkeys("qkv", torch.ones(1, 5, 2, 8)), "scale": 1.0}
    with pytest.raises(ValueError, match=f"{name} must be"):
        attention_stats_forward(*{**good, name: value}.values())


@DTYPES
@WITH_LSE
def test_vecmat_has_the_same_bits_again_and_with_any_number_of_threads(with_lse, dtype):
    q, k, _ = packed((1, 1025, 1, 32), dtype)
    weights, lse = torch.randn(1, 1, 1025), true_map(q, k, 0.2)[1] if with_lse else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append(vecmat(weights, q, k, 0.2, lse))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 65, 257])
@pytest.mark.parametrize("head_dim", [1, 5, 80])
def test_statistics_are_the_class_tokens_probabilities_and_the_rest_is_maws_attention_s(head_dim, tokens, dtype):
    q, k, v = packed((2, tokens, 3, head_dim), dtype)
    scale = head_dim**-0.5
    out, row, column, lse, row_max = attention_stats_forward(q, k, v, scale)
    logits = logits_of(q, k, scale)
    torch.testing.assert_close(row.double(), logits[:, :, 0].softmax(-1), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(column.double(), logits[..., 0].softmax(-1), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close((lse + scale * row_max).double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    maws_out, _, _, *of_queries = backend_cpp.maws_attention_forward(q, k, v, 1, scale, 0)
    without_lines = backend_cpp.KERNELS.attention_forward(q, k, v, scale)
    for mine, theirs, plain in zip((out, lse, row_max), (maws_out, *of_queries), without_lines):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, plain)
    assert out.is_contiguous()


def test_statistics_feed_vecmat():
    """The class row times the map, twice: three layers' worth of the chain that picks parts."""
    q, k, v = packed((2, 200, 3, 16))
    _, row, _, lse, row_max = attention_stats_forward(q, k, v, 0.25)
    probs = true_map(q, k, 0.25)[0]
    once = attention_vecmat_forward(row, q, k, lse + 0.25 * row_max, 0.25)
    agree(attention_vecmat_forward(once, q, k, lse + 0.25 * row_max, 0.25), probs[:, :, 0], probs @ probs)


MEMORY = """
import resource, torch
from ffvt.kernels.backend_cpp import attention_vecmat_forward
torch.set_num_threads(2)
q, weights = torch.randn(1, 8192, 1, 32), torch.rand(1, 1, 8192)
attention_vecmat_forward(weights[..., :99].contiguous(), q[:, :99], q[:, :99], None, 0.2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_vecmat_forward(weights, q, q, None, 0.2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_map():
    """8,192 tokens: a map would be 256 MiB; two threads' keys and blocks are six."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=dict(os.environ), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24  # MiB, with what oneDNN keeps of new shapes
