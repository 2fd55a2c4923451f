"""attention_vecmat: a row vector times the map, as the map itself gives it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ffvt
from tests.helpers import SHAPES, heads, rms, skip_unserved

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights_of(kind, shape):
    batch, tokens, num_heads, _ = shape
    if kind == "mixed":
        return torch.randn(batch, num_heads, tokens)
    weights = torch.zeros(batch, num_heads, tokens)
    weights[..., : tokens if kind == "ones" else 1] = 1.0
    return weights


def probs_of(q, k, scale, dtype):
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q.detach().to(dtype), k.detach().to(dtype))
    return logits.softmax(-1)


def times(weights, probs):
    return (weights.to(probs.dtype).unsqueeze(-2) @ probs).squeeze(-2)


@pytest.mark.parametrize(("kind", "with_lse"), [("mixed", False), ("mixed", True), ("ones", False), ("class", True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_stays_within_twice_that_of_the_map_in_fp32(backend, shape, dtype, kind, with_lse):
    skip_unserved(backend, dtype)
    q, k, v = heads(shape, dtype)
    weights, scale = weights_of(kind, shape), shape[3] ** -0.5
    with ffvt.use_backend(backend):
        lse = ffvt.attention_stats(q, k, v)[1].lse if with_lse else None
        found = ffvt.attention_vecmat(weights, q, k, lse)
    expected = times(weights, probs_of(q, k, scale, torch.float64))
    plain = times(weights, probs_of(q, k, scale, torch.float32))
    degree = 1e-6 if dtype == torch.float32 else 1e-5  # of the kernels' exponential
    assert found.dtype == torch.float32
    assert found.shape == (shape[0], shape[2], shape[1])
    assert rms(found, expected) <= 2 * rms(plain, expected) + degree * expected.abs().max().item()


def test_a_chain_is_the_row_of_the_product_of_maps(backend):
    layers = [heads((2, 37, 3, 16))[:2] for _ in range(4)]
    flow = torch.zeros(2, 3, 37)
    flow[..., 0] = 1.0
    with ffvt.use_backend(backend):
        for q, k in reversed(layers):
            flow = ffvt.attention_vecmat(flow, q, k)
    product = torch.eye(37, dtype=torch.float64).expand(2, 3, 37, 37)
    for q, k in layers:
        product = probs_of(q, k, 0.25, torch.float64) @ product
    torch.testing.assert_close(flow.double(), product[:, :, 0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(flow.sum(-1), torch.ones(2, 3), rtol=1e-5, atol=1e-5)


def test_a_one_in_the_weights_reads_a_row(backend):
    q, k, _ = heads((1, 21, 2, 8))
    probs = probs_of(q, k, 0.5, torch.float32)
    with ffvt.use_backend(backend):
        for token in (0, 1, 20):
            weights = torch.zeros(1, 2, 21)
            weights[..., token] = 1.0
            found = ffvt.attention_vecmat(weights, q, k, scale=0.5)
            torch.testing.assert_close(found, probs[:, :, token], rtol=2e-5, atol=1e-7)


def test_strides_of_every_input_are_followed(backend):
    q, k, _ = torch.randn(2, 33, 3, 4, 16).unbind(2)
    weights = torch.randn(1, 1, 33).expand(2, 4, 33)
    lse = torch.randn(2, 33, 4).transpose(1, 2)
    with ffvt.use_backend(backend):
        found = ffvt.attention_vecmat(weights, q, k, lse)
        expected = ffvt.attention_vecmat(weights.contiguous(), q.contiguous(), k.contiguous(), lse.contiguous())
    torch.testing.assert_close(found, expected)


def test_large_logits_keep_their_probabilities(backend):
    q, k, _ = (t.detach() for t in heads((1, 50, 2, 16)))
    weights, q = torch.rand(1, 2, 50), 40 * q
    with ffvt.use_backend(backend):
        found = ffvt.attention_vecmat(weights, q, k)
    expected = times(weights, probs_of(q, k, 0.25, torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_nan_in_one_head_leaves_the_others_alone(backend):
    q, k, _ = (t.detach() for t in heads((2, 70, 2, 8)))
    weights = torch.rand(2, 2, 70)
    with ffvt.use_backend(backend):
        clean = ffvt.attention_vecmat(weights, q, k)
        q[0, 65, 1, 2] = torch.nan
        found = ffvt.attention_vecmat(weights, q, k)
    assert found[0, 1].isnan().all()
    for image, head in ((0, 0), (1, 0), (1, 1)):
        assert torch.equal(found[image, head], clean[image, head])


def test_two_runs_are_equal_to_the_bit(backend):
    q, k, _ = heads((2, 131, 3, 16))
    weights = torch.randn(2, 3, 131)
    with ffvt.use_backend(backend):
        assert torch.equal(*(ffvt.attention_vecmat(weights, q, k) for _ in range(2)))


def test_no_result_carries_a_gradient(backend):
    q, k, v = heads((1, 6, 2, 4))
    weights = torch.rand(1, 2, 6, requires_grad=True)
    with ffvt.use_backend(backend):
        assert not ffvt.attention_vecmat(weights, q, k, ffvt.attention_stats(q, k, v)[1].lse).requires_grad


def test_fp64_inputs_are_multiplied_in_fp64(backend):
    skip_unserved(backend, torch.float64)
    q, k, v = heads((2, 19, 2, 8), torch.float64)
    weights = torch.randn(2, 2, 19)
    with ffvt.use_backend(backend):
        lse = ffvt.attention_stats(q, k, v)[1].lse
        found = ffvt.attention_vecmat(weights, q, k, lse)
    torch.testing.assert_close(found, times(weights, probs_of(q, k, 8**-0.5, torch.float64)).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, with_lse):
    skip_unserved(backend, dtype)
    q, k, _ = (t.detach() for t in heads((2, 9, 2, 8), dtype))
    lse = torch.randn(2, 2, 9) if with_lse else None
    torch.library.opcheck(torch.ops.ffvt.attention_vecmat, (torch.rand(2, 2, 9), q, k, lse, 0.5, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_with_the_same_results(backend, dynamic):
    def step(weights, q, k):
        return ffvt.attention_vecmat(weights, q, k).mean(1), ffvt.attention_vecmat(weights, q, k, weights)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 14):
        weights, q, k = torch.randn(2, 3, tokens), torch.randn(2, tokens, 3, 8), torch.randn(2, tokens, 3, 8)
        with ffvt.use_backend(backend):
            assert all(torch.equal(a, b) for a, b in zip(compiled(weights, q, k), step(weights, q, k)))


def test_exports(backend):
    class Module(torch.nn.Module):
        def forward(self, weights, q, k, lse):
            return ffvt.attention_vecmat(weights, q, k), ffvt.attention_vecmat(weights, q, k, lse)

    inputs = torch.rand(2, 2, 9), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8), 3 + torch.rand(2, 2, 9)
    with ffvt.use_backend(backend):
        program = torch.export.export(Module(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(program.module()(*inputs), Module()(*inputs)))
    plain = program.run_decompositions(ffvt.decompositions())
    assert not any("ffvt" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(*inputs), Module()(*inputs), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_an_empty_result(backend):
    q = torch.zeros(0, 5, 2, 4)
    with ffvt.use_backend(backend):
        assert ffvt.attention_vecmat(torch.zeros(0, 2, 5), q, q).shape == (0, 2, 5)


def test_autocast_casts_q_and_k_only():
    q, k, _ = heads((1, 9, 2, 8))
    weights = torch.rand(1, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = ffvt.attention_vecmat(weights, q, k)
    assert found.dtype == torch.float32
    assert torch.equal(found, ffvt.attention_vecmat(weights, q.bfloat16(), k.bfloat16()))


def test_the_flop_counter_counts_the_products():
    q, weights = torch.zeros(2, 9, 3, 8), torch.zeros(2, 3, 9)
    product = 2 * 2 * 3 * 9 * 9 * 8
    for lse, expected in ((None, 2 * product), (weights, product)):
        with FlopCounterMode(display=False) as counter:
            ffvt.attention_vecmat(weights, q, q, lse)
        assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        ffvt.attention_stats(q, q, q)
    assert counter.get_total_flops() == 2 * product


GOOD, LINE = torch.zeros(1, 9, 2, 8), torch.zeros(1, 2, 9)
BAD = {
    "weights' shape": (dict(weights=LINE[..., :5]), ValueError, r"weights must be \(B, H, N\); got .*\(1, 2, 5\)"),
    "weights' dtype": (dict(weights=LINE.half()), TypeError, "weights must be torch.float32; got .*float16"),
    "weights missing": (dict(weights=None), TypeError, "weights must be a tensor; got weights=None"),
    "lse's shape": (dict(lse=LINE[:, :1]), ValueError, r"lse must be \(B, H, N\)"),
    "lse's dtype": (dict(lse=LINE.double()), TypeError, "lse must be torch.float32; got lse.dtype=torch.float64"),
    "lse's type": (dict(lse=0.0), TypeError, "lse must be a tensor; got lse=0.0"),
    "k's shape": (dict(k=GOOD[:, :5]), ValueError, "q and k must have one shape"),
    "scale": (dict(scale=0.0), ValueError, "attention_vecmat: scale must be finite and positive; got scale=0.0"),
    "device": (dict(weights=LINE.to("meta")), ValueError, "all tensors must be on one device"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ffvt.attention_vecmat(**({"weights": LINE, "q": GOOD, "k": GOOD} | change))
