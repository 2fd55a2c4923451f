"""attention_stats: what the class token's lines and lse hold, and that its attention is maws_attention's."""

import pytest
import torch

import ffvt
from tests.helpers import SHAPES, explicit, heads, rms, skip_unserved, truth

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_ULP = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def true_stats(q, k, scale):
    """Row, column and lse (B, H, N), in fp64."""
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q.detach().double(), k.detach().double())
    return logits[:, :, 0].softmax(-1), logits[..., 0].softmax(-1), logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_the_map(backend, dtype, shape):
    skip_unserved(backend, dtype)
    q, k, v = heads(shape, dtype)
    scale = shape[3] ** -0.5
    with ffvt.use_backend(backend):
        out, stats = ffvt.attention_stats(q, k, v)
    expected = truth(q, k, v, scale)[0]
    rounding = HALF_ULP[dtype] * expected.abs().max().item()
    assert rms(out, expected) <= 2 * rms(explicit(q, k, v, scale), expected) + rounding
    assert out.dtype == dtype
    assert out.is_contiguous()
    for found, right in zip(stats, true_stats(q, k, scale)):
        assert found.dtype == torch.float32
        assert found.shape == (shape[0], shape[2], shape[1])
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.row.sum(-1), torch.ones(shape[0], shape[2]))
    torch.testing.assert_close(stats.column.sum(-1), torch.ones(shape[0], shape[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_its_gradients_are_those_of_maws_attention_to_the_bit(backend, dtype):
    skip_unserved(backend, dtype)
    if backend == "torch":
        pytest.skip("PyTorch's own attention does not promise equal bits")
    q, k, v = heads((1, 67, 2, 32), dtype)
    grad_out = torch.randn(q.shape).to(dtype)
    with ffvt.use_backend(backend):
        found, expected = ffvt.attention_stats(q, k, v, 0.2)[0], ffvt.maws_attention(q, k, v, 5, 0.2)[0]
        grads = [torch.autograd.grad(out, (q, k, v), grad_out) for out in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_two_lines_give_the_score_of_maws_attention(backend):
    q, k, v = heads((3, 67, 4, 16))
    with ffvt.use_backend(backend):
        stats, score = ffvt.attention_stats(q, k, v)[1], ffvt.maws_attention(q, k, v, 5)[2]
    torch.testing.assert_close(stats.row.mean(1) * stats.column.mean(1), score, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_lse_makes_probabilities_of_logits(backend, magnitude):
    q, k, v = (magnitude * t.detach() for t in heads((1, 40, 2, 16)))
    with ffvt.use_backend(backend):
        lse = ffvt.attention_stats(q, k, v, 0.25)[1].lse
    logits = 0.25 * torch.einsum("bnhd,bmhd->bhnm", q, k)
    largest = logits.abs().max().item()
    torch.testing.assert_close(
        (logits - lse.unsqueeze(-1)).exp(), logits.softmax(-1), rtol=1e-6 * largest + 1e-5, atol=1e-6
    )


def test_only_out_carries_a_gradient(backend):
    with ffvt.use_backend(backend):
        out, stats = ffvt.attention_stats(*heads((1, 6, 2, 4)))
    assert out.requires_grad
    assert not any(t.requires_grad for t in stats)


def test_fp64_gradcheck_and_stats(backend):
    skip_unserved(backend, torch.float64)
    with ffvt.use_backend(backend):
        inputs = heads((2, 6, 2, 3), torch.float64)
        assert torch.autograd.gradcheck(lambda q, k, v: ffvt.attention_stats(q, k, v)[0], inputs)
        stats = ffvt.attention_stats(*inputs)[1]
    assert [t.dtype for t in stats] == [torch.float32, torch.float32, torch.float64]


def test_strided_inputs_give_what_contiguous_ones_give(backend):
    q, k, v = torch.randn(2, 33, 3, 4, 16).unbind(2)
    with ffvt.use_backend(backend):
        found, stats = ffvt.attention_stats(q, k, v)
        expected, right = ffvt.attention_stats(*(t.contiguous() for t in (q, k, v)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(tuple(stats), tuple(right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    skip_unserved(backend, dtype)
    torch.library.opcheck(torch.ops.ffvt.attention_stats, (*heads((2, 9, 2, 8), dtype), 0.5, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_with_the_same_results(backend, dynamic):
    def step(qkv):
        out, stats = ffvt.attention_stats(*qkv.unbind(2))
        return out.cos(), stats.row, stats.column, stats.lse

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 14):
        qkv = torch.randn(2, tokens, 3, 2, 8, requires_grad=True)
        with ffvt.use_backend(backend):
            found, expected = compiled(qkv), step(qkv)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        torch.testing.assert_close(*(torch.autograd.grad(result[0].sum(), qkv)[0] for result in (found, expected)))


def test_exports(backend):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            out, stats = ffvt.attention_stats(q, k, v)
            return out, *stats

    inputs = tuple(torch.randn(2, 9, 2, 8) for _ in range(3))
    with ffvt.use_backend(backend):
        program = torch.export.export(Module(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(program.module()(*inputs), Module()(*inputs)))
    plain = program.run_decompositions(ffvt.decompositions())
    assert not any("ffvt" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(*inputs), Module()(*inputs))


def test_two_runs_are_equal_to_the_bit(backend):
    q, k, v = heads((2, 131, 3, 16))
    with ffvt.use_backend(backend):
        (first, one), (second, other) = (ffvt.attention_stats(q, k, v) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_nan_in_one_image_leaves_the_others_alone(backend):
    q, k, v = (t.detach() for t in heads((2, 9, 2, 8)))
    with ffvt.use_backend(backend):
        clean = ffvt.attention_stats(q, k, v)[1]
        q[0, 4, 1, 2] = torch.nan
        stats = ffvt.attention_stats(q, k, v)[1]
    assert stats.column[0, 1].isnan().all()
    for found, right in zip(stats, clean):
        assert torch.equal(found[1], right[1])


def test_an_empty_batch_gives_empty_results(backend):
    q = torch.zeros(0, 5, 2, 4, requires_grad=True)
    with ffvt.use_backend(backend):
        out, stats = ffvt.attention_stats(q, q, q)
        out.sum().backward()
    assert out.shape == q.grad.shape == (0, 5, 2, 4)
    assert all(t.shape == (0, 2, 5) for t in stats)


def test_autocast_casts():
    q, k, v = heads((1, 9, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, stats = ffvt.attention_stats(q, k, v)
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in stats} == {torch.float32}
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_forward_mode_and_a_second_gradient_are_refused():
    q, k, v = heads((1, 5, 1, 4))
    with pytest.raises(NotImplementedError, match="attention_stats: q must have no tangent"):
        torch.func.jvp(lambda q: ffvt.attention_stats(q, k.detach(), v.detach())[0], (q.detach(),), (q.detach(),))
    (grad,) = torch.autograd.grad(ffvt.attention_stats(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first gradient only"):
        grad.sum().backward()


def test_shapes_follow_on_the_meta_device():
    q = torch.zeros(2, 9, 2, 8, device="meta")
    out, stats = ffvt.attention_stats(q, q, q)
    assert out.shape == q.shape
    assert all(t.shape == (2, 2, 9) for t in stats)


GOOD = torch.zeros(1, 9, 2, 8)
BAD = {
    "scale": (dict(scale=-1.0), ValueError, "attention_stats: scale must be finite and positive; got scale=-1.0"),
    "scale's type": (dict(scale="1"), TypeError, "scale must be a number or None; got scale='1'"),
    "shape": (dict(k=GOOD[:, :5]), ValueError, "q and k must have one shape"),
    "dtype": (dict(v=GOOD.half()), TypeError, "q and v must have one dtype"),
    "integers": (dict(q=GOOD.int(), k=GOOD.int(), v=GOOD.int()), TypeError, "q must be one of float16"),
    "rank": (dict(q=GOOD[0], k=GOOD[0], v=GOOD[0]), ValueError, r"q must be \(B, N, H, D\)"),
    "stride": (dict(q=torch.zeros(1, 9, 8, 2).mT), ValueError, "q must have unit last stride"),
    "no tensor": (dict(q=1), TypeError, "q must be a tensor; got q=1"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ffvt.attention_stats(**({"q": GOOD, "k": GOOD, "v": GOOD} | change))
