"""What only a GPU can show: streams and graphs, compilers, sizes, and bitwise repeats by the hundred."""

import pytest
import torch

import ffvt

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def packed(batch, tokens, heads, head_dim, dtype=torch.bfloat16):
    return torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=dtype).requires_grad_()


def run(qkv, upstream):
    out, index, score = ffvt.maws_attention_qkvpacked(qkv, 12)
    return out, index, score, torch.autograd.grad(out, qkv, upstream)[0]


def statistics(qkv, upstream):
    """attention_stats, and attention_vecmat of weights of both signs, with the lse of these and without."""
    q, k, v = qkv.unbind(2)
    out, stats = ffvt.attention_stats(q, k, v)
    weights = upstream[..., 0].transpose(1, 2).float()
    products = [ffvt.attention_vecmat(weights, q, k, lse) for lse in (stats.lse, None)]
    return out, *stats, *products


BOTH = pytest.mark.parametrize("function", [run, statistics])


def test_the_kernels_are_the_automatic_choice():
    assert ffvt.info()["devices"]["cuda"]["serves"] == "triton"


@BOTH
@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_250_runs_are_equal_to_the_bit(dtype, head_dim, function):
    qkv = packed(2, 577, 4, head_dim, dtype)
    upstream = torch.randn(2, 577, 4, head_dim, device="cuda", dtype=dtype)
    first = function(qkv, upstream)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, function(qkv, upstream)))


@DTYPES
@pytest.mark.parametrize(("tokens", "head_dim"), [(2, 64), (197, 16), (197, 33), (577, 64), (785, 80), (130, 128)])
def test_the_statistics_are_those_of_the_reference_in_fp64(dtype, tokens, head_dim):
    qkv = packed(2, tokens, 3, head_dim, dtype)
    upstream = torch.randn(2, tokens, 3, head_dim, device="cuda", dtype=dtype)
    _, *lines, with_lse, without_lse = statistics(qkv, upstream)
    q, k, v = qkv.detach().double().unbind(2)
    for found, expected in zip(lines, ffvt.reference.attention_stats(q, k, v)[1]):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-6)
    weights = upstream[..., 0].transpose(1, 2).float()
    expected, magnitude = (ffvt.reference.attention_vecmat(w, q, k).double() for w in (weights, weights.abs()))
    for found in (with_lse, without_lse):
        assert ((found.double() - expected).abs() - 1e-4 * magnitude).max() <= 0


@BOTH
def test_a_cuda_graph_replays_on_new_inputs(function):
    qkv = packed(2, 197, 3, 64)
    upstream = torch.randn(2, 197, 3, 64, device="cuda", dtype=qkv.dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(qkv, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = function(qkv, upstream)
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, function(qkv, upstream)))


def test_compiles_in_one_graph():
    def step(qkv):
        out, index, score = ffvt.maws_attention_qkvpacked(qkv, 12)
        return ffvt.gather_tokens(out.flatten(2).sin(), index).float().square().sum(), score

    qkv = packed(2, 197, 3, 64)
    compiled = torch.compile(step, fullgraph=True)
    (found, score), (expected, expected_score) = compiled(qkv), step(qkv)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(score, expected_score)
    grads = [torch.autograd.grad(loss, qkv)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


def test_autocast_takes_the_dtype_of_the_device():
    qkv = packed(1, 65, 2, 64, torch.float32)
    with torch.autocast("cuda", torch.float16):
        out = ffvt.maws_attention_qkvpacked(qkv, 3)[0]
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32


def test_offsets_past_two_to_the_31_elements_are_right():
    """The last image of a batch of more than 2^31 elements of qkv gives what it gives alone."""
    tokens, heads, head_dim = 1025, 16, 128
    batch = 2**31 // (tokens * 3 * heads * head_dim) + 2
    if torch.cuda.mem_get_info()[0] < 4 * 2 * batch * tokens * 3 * heads * head_dim:
        pytest.skip("less GPU memory is free than this takes")
    qkv = torch.empty(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    for image in qkv:
        image.normal_()
    assert qkv.numel() > 2**31
    last = qkv[-1:].clone().requires_grad_()
    upstream = torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=qkv.dtype)
    alone = run(last, upstream)
    qkv.requires_grad_()
    out, index, score = ffvt.maws_attention_qkvpacked(qkv, 12)
    assert torch.equal(out[-1:], alone[0])
    assert torch.equal(index[-1:], alone[1])
    assert torch.equal(score[-1:], alone[2])
    (grad,) = torch.autograd.grad(out, qkv, upstream.expand_as(out))
    assert torch.equal(grad[-1:], alone[3])


def test_the_second_gpu_or_stream_is_respected():
    qkv = packed(1, 197, 2, 64)
    expected = ffvt.maws_attention_qkvpacked(qkv, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ffvt.maws_attention_qkvpacked(qkv, 3)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    if torch.cuda.device_count() > 1:
        other = ffvt.maws_attention_qkvpacked(qkv.to("cuda:1"), 3)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(other, expected))


@pytest.mark.parametrize(("function", "lines"), [(run, 4), (statistics, 8)])
def test_no_map_of_n_by_n_exists(function, lines):
    """Growth of a call at N = 4,097 over the results themselves: a few fp32 arrays (B, H, N)."""
    batch, tokens, heads, head_dim = 1, 4097, 4, 64
    qkv = packed(batch, tokens, heads, head_dim)
    upstream = torch.randn(batch, tokens, heads, head_dim, device="cuda", dtype=qkv.dtype)
    function(qkv, upstream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    results = function(qkv, upstream)
    torch.cuda.synchronize()
    kept = sum(t.numel() * t.element_size() for t in results)
    line = 4 * batch * heads * tokens
    assert torch.cuda.max_memory_allocated() - held - kept <= lines * line + 2**16
