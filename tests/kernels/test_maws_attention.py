"""maws_attention and maws_attention_qkvpacked: values, picks, gradients, and how they behave as operators."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import ffvt
from ffvt.kernels import backend_torch
from tests.helpers import SHAPES, explicit, heads, rms, skip_unserved, truth, worst

HALF_ULP = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 2**-53}
LAYOUTS = ("separate", "packed")


def attend(layout, q, k, v, *args, **kwargs):
    if layout == "separate":
        return ffvt.maws_attention(q, k, v, *args, **kwargs)
    return ffvt.maws_attention_qkvpacked(torch.stack([q, k, v], dim=2), *args, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_stays_within_twice_that_of_plain_matmuls(backend, layout, dtype, shape):
    skip_unserved(backend, dtype)
    q, k, v = heads(shape, dtype)
    scale = shape[3] ** -0.5
    with ffvt.use_backend(backend):
        out, index, score = attend(layout, q, k, v, 1)
    expected, expected_score = truth(q, k, v, scale)
    rounding = HALF_ULP[dtype] * expected.abs().max().item()
    assert rms(out, expected) <= 2 * rms(explicit(q, k, v, scale), expected) + rounding
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert worst(score, expected_score) <= 2e-6 * expected_score.max().item() * max(1.0, q.abs().max().item() ** 2)
    assert score.dtype == torch.float32
    assert index.dtype == torch.int64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_error_stays_within_three_times_that_of_plain_matmuls(backend, layout, dtype, shape):
    skip_unserved(backend, dtype)
    q, k, v = heads(shape, dtype)
    scale = shape[3] ** -0.5
    grad_out = torch.randn(shape).to(dtype)
    with ffvt.use_backend(backend):
        found = torch.autograd.grad(attend(layout, q, k, v, 1)[0], (q, k, v), grad_out)
    plain = torch.autograd.grad(explicit(q, k, v, scale), (q, k, v), grad_out)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(truth(*wide, scale)[0], wide, grad_out.double())
    for mine, theirs, true in zip(found, plain, expected):
        rounding = HALF_ULP[dtype] * true.abs().max().item()
        assert rms(mine, true) <= 3 * rms(theirs, true) + rounding


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first_candidate", [0, 1])
def test_picks_are_the_largest_scores_in_order(backend, shape, first_candidate):
    tokens = shape[1]
    if tokens <= first_candidate:
        pytest.skip(f"N={tokens} leaves no candidate from {first_candidate} on")
    q, k, v = heads(shape)
    num_select = min(12, tokens - first_candidate)
    with ffvt.use_backend(backend):
        _, index, score = ffvt.maws_attention(q, k, v, num_select, first_candidate=first_candidate)
        assert torch.equal(index, ffvt.maws_select(q, k, num_select, first_candidate=first_candidate)[0])
    for image in range(shape[0]):
        values = score[image].tolist()
        order = sorted(range(first_candidate, tokens), key=lambda token: (-values[token], token))
        assert index[image].tolist() == order[:num_select]
    exact = truth(q, k, v, shape[3] ** -0.5)[1][:, first_candidate:]
    ranked = exact.sort(dim=-1, descending=True).values
    if tokens - first_candidate > num_select:  # unless the cut is a near tie, the set is the true one
        clear = ranked[:, num_select - 1] - ranked[:, num_select] > 4 * worst(score[:, first_candidate:], exact)
        chosen = exact.topk(num_select).indices + first_candidate
        assert clear.any()
        assert torch.equal(index[clear].sort().values, chosen[clear].sort().values)


def test_the_product_is_of_head_means_not_the_mean_of_products(backend):
    q, k, v = heads((1, 9, 4, 8))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
    row, column = logits[:, :, 0].softmax(-1), logits[..., 0].softmax(-1)
    with ffvt.use_backend(backend):
        score = ffvt.maws_attention(q, k, v, 1)[2]
    torch.testing.assert_close(score, row.mean(1) * column.mean(1))
    assert not torch.allclose(score, (row * column).mean(1))


def test_ties_go_to_the_lower_index(backend):
    q, k, v = (torch.zeros(2, 11, 2, 4) for _ in range(3))  # all scores are equal
    with ffvt.use_backend(backend):
        assert ffvt.maws_attention(q, k, v, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2
        assert ffvt.maws_attention(q, k, v, 5, first_candidate=3)[1].tolist() == [[3, 4, 5, 6, 7]] * 2
        k[:, [4, 9]] = 1.0
        q[:] = 1.0  # tokens 4 and 9 now tie ahead of all others
        assert ffvt.maws_attention(q, k, v, 3)[1].tolist() == [[4, 9, 0]] * 2


@pytest.mark.parametrize("select_top", [ffvt.reference.select_top, backend_torch.select_top])
def test_nan_scores_rank_last_and_are_picked_only_for_want_of_others(select_top):
    score = torch.tensor([[0.1, torch.nan, 0.3, torch.nan, 0.2, 0.0]])
    assert select_top(score, 6, 0).tolist() == [[2, 4, 0, 5, 1, 3]]
    assert select_top(score, 5, 1).tolist() == [[2, 4, 5, 1, 3]]


def test_a_nan_in_one_image_leaves_the_others_alone(backend):
    q, k, v = (t.detach() for t in heads((2, 9, 2, 8)))
    with ffvt.use_backend(backend):
        clean = ffvt.maws_attention(q, k, v, 3)
        q[0, 4, 1, 2] = torch.nan
        out, index, _ = ffvt.maws_attention(q, k, v, 3)
    assert index[0].tolist() == [0, 1, 2]  # the softmax of column 0 is all NaN, so every score ties at last
    assert torch.equal(index[1], clean[1][1])
    assert torch.equal(out[1], clean[0][1])


def test_all_tokens_can_be_picked(backend):
    q, k, v = heads((2, 13, 2, 8))
    with ffvt.use_backend(backend):
        index = ffvt.maws_attention(q, k, v, 13)[1]
    assert index.sort().values.tolist() == [list(range(13))] * 2


def test_an_empty_batch_gives_empty_results(backend):
    q = torch.zeros(0, 5, 2, 4, requires_grad=True)
    with ffvt.use_backend(backend):
        out, index, score = ffvt.maws_attention(q, q, q, 2)
        out.sum().backward()
    assert out.shape == (0, 5, 2, 4)
    assert index.shape == (0, 2)
    assert score.shape == (0, 5)
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_out_carries_a_gradient(backend, layout):
    with ffvt.use_backend(backend):
        results = attend(layout, *heads((1, 6, 2, 4)), 2)
    assert [t.requires_grad for t in results] == [True, False, False]


def test_strided_inputs_give_what_contiguous_ones_give(backend):
    wide = torch.randn(2, 3, 11, 3, 20)
    q, k, v = (
        t.transpose(1, 2)[..., 4:12].requires_grad_() for t in wide.permute(3, 0, 1, 2, 4).contiguous().unbind(0)
    )
    assert not q.is_contiguous()
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    copies = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    with ffvt.use_backend(backend):
        found = ffvt.maws_attention(q, k, v, 4)
        expected = ffvt.maws_attention(*copies, 4)
        for mine, theirs in zip(found, expected):
            torch.testing.assert_close(mine, theirs)
        mine = torch.autograd.grad(found[0].square().sum(), (q, k, v))
        theirs = torch.autograd.grad(expected[0].square().sum(), copies)
    torch.testing.assert_close(mine, theirs)


def test_packed_and_separate_agree_to_the_bit():
    qkv = torch.randn(2, 17, 3, 2, 8, requires_grad=True)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(2))
    packed, separate = ffvt.maws_attention_qkvpacked(qkv, 5), ffvt.maws_attention(q, k, v, 5)
    assert all(torch.equal(a, b) for a, b in zip(packed, separate))
    (grad,) = torch.autograd.grad(packed[0].sin().sum(), qkv)
    grads = torch.autograd.grad(separate[0].sin().sum(), (q, k, v))
    assert torch.equal(grad, torch.stack(grads, dim=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64_gradcheck(backend, layout):
    skip_unserved(backend, torch.float64)
    with ffvt.use_backend(backend):
        inputs = heads((2, 6, 2, 3), torch.float64)
        assert torch.autograd.gradcheck(lambda q, k, v: attend(layout, q, k, v, 2)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_tiled_backward_of_other_devices_agrees_with_the_reference(dtype):
    q, k, v = (t.detach() for t in heads((1, 261, 2, 8), dtype))
    if dtype == torch.float16:  # unscaled logits of this size overflow
        q, k = 40 * q, 40 * k
    grad_out = torch.randn_like(q)
    out, _, _, lse, row_max = ffvt.reference.maws_attention_forward(q, k, v, 1, 0.3, 0)
    expected, found = ([torch.empty_like(q) for _ in range(3)] for _ in range(2))
    ffvt.reference.maws_attention_backward(grad_out, q, k, v, out, lse, row_max, 0.3, expected)
    backend_torch.tiled_backward(grad_out, q, k, v, out, 0.3, found)
    share = 1e-12 if dtype == torch.float64 else 0.1  # sharp fp16 rows: the rounding of `out` is most of delta
    for mine, theirs in zip(found, expected):
        assert mine.isfinite().all()
        assert rms(mine, theirs.double()) <= share * theirs.double().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    skip_unserved(backend, dtype)
    q, k, v = heads((2, 9, 1 if backend == "triton" else 2, 8), dtype)  # a head less: the interpreter is slow
    torch.library.opcheck(torch.ops.ffvt.maws_attention, (q, k, v, 3, 0.5, 1, backend))
    qkv = torch.stack([q, k, v], dim=2).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ffvt.maws_attention_qkvpacked, (qkv, 3, 0.5, 1, backend))
    out, _, _, *statistics = (t.detach() for t in torch.ops.ffvt.maws_attention(q, k, v, 3, 0.5, 1, backend))
    q, k, v, qkv = (t.detach() for t in (q, k, v, qkv))
    torch.library.opcheck(torch.ops.ffvt.maws_attention_backward, (out, q, k, v, out, *statistics, 0.5, backend))
    torch.library.opcheck(torch.ops.ffvt.maws_attention_qkvpacked_backward, (out, qkv, out, *statistics, 0.5, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_with_the_same_results(backend, dynamic):
    def step(qkv):
        out, index, score = ffvt.maws_attention_qkvpacked(qkv, 3, first_candidate=1)
        return out.cos(), index, score

    torch.compiler.reset()  # each backend compiles anew
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 14):
        qkv = torch.randn(2, tokens, 3, 2, 8, requires_grad=True)
        with ffvt.use_backend(backend):
            found, expected = compiled(qkv), step(qkv)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        grads = [torch.autograd.grad(result[0].sum(), qkv)[0] for result in (found, expected)]
        torch.testing.assert_close(*grads)


def test_exports(backend):
    class Module(torch.nn.Module):
        def forward(self, qkv):
            return ffvt.maws_attention_qkvpacked(qkv, 3)

    qkv = torch.randn(2, 9, 3, 2, 8)
    with ffvt.use_backend(backend):
        program = torch.export.export(Module(), (qkv,))
        assert all(torch.equal(a, b) for a, b in zip(program.module()(qkv), Module()(qkv)))


def test_trains_under_ddp(backend, tmp_path):
    device = torch.get_default_device()
    torch.distributed.init_process_group(
        "gloo" if device.type == "cpu" else "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        layer = ffvt.MAWSAttention(32, 2, 3)
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        x = torch.randn(2, 9, 32)
        with ffvt.use_backend(backend):
            parallel(x)[0].square().sum().backward()
            found = [parameter.grad.clone() for parameter in layer.parameters()]
            layer.zero_grad()
            layer(x)[0].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for mine, parameter in zip(found, layer.parameters()):
        torch.testing.assert_close(mine, parameter.grad)


def test_two_runs_are_equal_to_the_bit(backend):
    q, k, v = heads((1, 131, 2, 16))
    with ffvt.use_backend(backend):
        runs = [ffvt.maws_attention(q, k, v, 12) for _ in range(2)]
        grads = [torch.autograd.grad(out.sin().sum(), (q, k, v)) for out, _, _ in runs]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_autocast_casts_and_gradients_come_back_in_the_dtype_of_the_input():
    q, k, v = heads((1, 9, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, _, score = ffvt.maws_attention(q, k, v, 3)
        packed = ffvt.maws_attention_qkvpacked(torch.stack([q, k, v], 2), 3)[0]
        assert ffvt.maws_select(q, k, 3)[1].dtype == torch.float32
    assert out.dtype == packed.dtype == torch.bfloat16
    assert score.dtype == torch.float32
    assert torch.equal(out, packed)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_a_forward_mode_gradient_is_refused():
    q, k, v = (t.detach() for t in heads((1, 5, 1, 4)))
    with pytest.raises(NotImplementedError, match="maws_attention: q must have no tangent"):
        torch.func.jvp(lambda q: ffvt.maws_attention(q, k, v, 1)[0], (q,), (q,))


def test_shapes_follow_on_the_meta_device():
    q = torch.zeros(2, 9, 2, 8, device="meta")
    out, index, score = ffvt.maws_attention(q, q, q, 3)
    assert (out.shape, index.shape, score.shape) == ((2, 9, 2, 8), (2, 3), (2, 9))


def test_a_second_gradient_is_refused():
    q, k, v = heads((1, 5, 1, 4))
    (grad,) = torch.autograd.grad(ffvt.maws_attention(q, k, v, 1)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first gradient only"):
        grad.sum().backward()


BAD = {
    "num_select too large": (dict(num_select=10), ValueError, r"maws_attention: num_select .*9.*got num_select=10"),
    "num_select zero": (dict(num_select=0), ValueError, "got num_select=0"),
    "num_select not an int": (dict(num_select=2.0), TypeError, "got num_select=2.0"),
    "num_select past the candidates": (dict(num_select=7, first_candidate=3), ValueError, "got num_select=7"),
    "first_candidate negative": (dict(first_candidate=-1), ValueError, "got first_candidate=-1"),
    "first_candidate past the end": (dict(first_candidate=9), ValueError, "got first_candidate=9"),
    "scale negative": (
        dict(scale=-1.0),
        ValueError,
        "maws_attention: scale must be finite and positive; got scale=-1.0",
    ),
    "scale zero": (dict(scale=0), ValueError, "got scale=0.0"),
    "scale infinite": (dict(scale=float("inf")), ValueError, "got scale=inf"),
    "scale past fp32": (dict(scale=3e38), ValueError, r"scale must be at most 2.36e\+38, .*; got scale=3e\+38"),
    "scale a bool": (dict(scale=True), TypeError, "got scale=True"),
    "num_select a bool": (dict(num_select=True), TypeError, "got num_select=True"),
    "num_select NumPy's bool": (dict(num_select=np.True_), TypeError, "num_select must be an int"),
    "first_candidate not an int": (dict(first_candidate=0.0), TypeError, "got first_candidate=0.0"),
    "scale not finite": (dict(scale=float("nan")), ValueError, "got scale=nan"),
    "no tensor": (dict(q=None), TypeError, "got q=None"),
    "scale not a number": (dict(scale="a"), TypeError, "got scale='a'"),
    "rank": (dict(q=torch.zeros(9, 2, 8)), ValueError, r"q must be \(B, N, H, D\).*got q.shape=\(9, 2, 8\)"),
    "no tokens": (dict(q=torch.zeros(2, 0, 2, 8)), ValueError, r"got q.shape=\(2, 0, 2, 8\)"),
    "different shapes": (dict(k=torch.zeros(2, 9, 3, 8)), ValueError, r"k.shape=\(2, 9, 3, 8\)"),
    "different dtypes": (dict(v=torch.zeros(2, 9, 2, 8).half()), TypeError, "v.dtype=torch.float16"),
    "integers": (dict(q=torch.zeros(2, 9, 2, 8, dtype=torch.int32)), TypeError, "q.dtype=torch.int32"),
    "last stride": (dict(q=torch.zeros(2, 9, 8, 2).mT), ValueError, "q must have unit last stride"),
    "devices": (dict(v=torch.zeros(2, 9, 2, 8, device="meta")), ValueError, "v.device=meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {name: torch.zeros(2, 9, 2, 8) for name in "qkv"} | {"num_select": 3} | change
    with pytest.raises(error, match=message):
        ffvt.maws_attention(**arguments)
    if "v" not in change:
        del arguments["v"]
        with pytest.raises(error, match=message.replace("maws_attention", "maws_select")):
            ffvt.maws_select(**arguments)


def test_a_packed_tensor_without_three_parts_is_named():
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, H, D\); got qkv.shape=\(2, 9, 2, 2, 8\)"):
        ffvt.maws_attention_qkvpacked(torch.zeros(2, 9, 2, 2, 8), 3)


@pytest.mark.parametrize("name", ["triton", "cpp"])
def test_a_forced_backend_never_falls_back(name):
    q, k, v = heads((1, 5, 1, 4), torch.float64)
    calls = {
        "maws_attention": lambda: ffvt.maws_attention(q, k, v, 1),
        "maws_attention_qkvpacked": lambda: ffvt.maws_attention_qkvpacked(torch.stack([q, k, v], 2), 1),
        "maws_select": lambda: ffvt.maws_select(q, k, 1),
        "gather_tokens": lambda: ffvt.gather_tokens(q.flatten(2), torch.zeros(1, 1, dtype=torch.int64)),
    }
    for operator, call in calls.items():
        message = f"^{operator}: backend '{name}' cannot serve this call: .*dtype must be fp16, bf16 or fp32"
        with ffvt.use_backend(name), pytest.raises(NotImplementedError, match=message):
            call()
    with pytest.raises(ValueError, match="got name='cuda'"):
        ffvt.use_backend("cuda")


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    q, k, v = heads((1, 5, 1, 4))
    called = []
    truth_backward = ffvt.reference.maws_attention_backward
    monkeypatch.setattr(
        ffvt.reference, "maws_attention_backward", lambda *args: called.append("reference") or truth_backward(*args)
    )
    with ffvt.use_backend("reference"):
        out = ffvt.maws_attention(q, k, v, 1)[0]
    with ffvt.use_backend("torch"):
        out.sum().backward()
    assert called == ["reference"]


PEAK_MEMORY = """
import resource, torch, ffvt
torch.set_num_threads(1)
TOKENS = 4097
def operator(tokens):
    return ffvt.maws_attention_qkvpacked(torch.randn(1, tokens, 3, 4, 16, requires_grad=True), 12)[0]
def model(tokens):
    side = round((tokens - 1) ** 0.5)
    sizes = dict(embed_dim=32, depth=3, num_heads=2, mlp_dim=32, patch_size=2, image_size=2 * side, num_classes=2)
    return ffvt.create_model("vit_s16", **sizes)(torch.randn(1, 3, 2 * side, 2 * side))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
{name}(65).sum().backward()
before = peak()
{name}(TOKENS).sum().backward()
print((peak() - before) / (TOKENS * TOKENS * 4))
"""


@pytest.mark.parametrize("name", ["operator", "model"])
def test_no_map_of_n_by_n_exists_forward_or_backward(name):
    """Peak memory of a forward and backward at N = 4,097 grows by less than half of one head's fp32 map."""
    code = PEAK_MEMORY.format(name=name)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.5
