"""The registered operators: what an exported or traced program, a hook or a direct call may ask of them."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import ffvt
from ffvt.kernels.backends import _load, _missing
from ffvt.model.cost import flops_per_image
from tests.helpers import heads, tiny_model

OURS = torch.ops.ffvt
EVERY = [name for name in ("cpp", "torch", "reference") if not _missing(name)]
every_backend = pytest.mark.parametrize("name", EVERY)


class Separate(torch.nn.Module):
    def forward(self, q, k, v):
        return ffvt.maws_attention(q, k, v, 2)


class Packed(torch.nn.Module):
    def forward(self, qkv):
        return ffvt.maws_attention_qkvpacked(qkv, 2)


class Selection(torch.nn.Module):
    def forward(self, q, k):
        return ffvt.maws_select(q, k, 2)


def relaid(t):
    """Equal values; the last stride is not unit."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def programs(module, inputs, name):
    with ffvt.use_backend(name):
        yield torch.export.export(module, inputs).module()
        yield torch.export.export(module, inputs, strict=True).module()
        yield torch.jit.trace(module, inputs)


@pytest.mark.filterwarnings("ignore")
@every_backend
@pytest.mark.parametrize("module", [Separate(), Packed(), Selection()], ids=lambda m: type(m).__name__)
def test_an_exported_or_traced_program_is_right_for_other_strides(module, name):
    shapes = {"Separate": [(2, 9, 2, 8)] * 3, "Packed": [(2, 9, 3, 2, 8)], "Selection": [(2, 9, 2, 8)] * 2}
    inputs = tuple(torch.randn(shape) for shape in shapes[type(module).__name__])
    others = tuple(relaid(torch.randn_like(t)) for t in inputs)
    assert all(t.stride(-1) != 1 for t in others)
    with ffvt.use_backend(name):
        expected = module(*(t.contiguous() for t in others))
    for program in programs(module, inputs, name):
        for found, right in zip(program(*others), expected):
            torch.testing.assert_close(found, right)


@every_backend
def test_a_last_stride_of_zero_is_read_within_its_memory(name):
    memory = torch.cat([torch.zeros(1), torch.full((64,), 7.0)])
    zeros = memory.as_strided((1, 1, 1, 8), (1, 1, 1, 0))
    assert not OURS.maws_attention(zeros, zeros, zeros, 1, 1.0, 0, name)[0].any()


@pytest.mark.filterwarnings("ignore")
@every_backend
def test_a_traced_program_with_too_few_tokens_is_refused(name):
    class Module(torch.nn.Module):
        def forward(self, q):
            return ffvt.maws_attention(q, q, q, 8)[1]

    with ffvt.use_backend(name):
        traced = torch.jit.trace(Module(), torch.randn(1, 9, 1, 8))
    with pytest.raises((ValueError, RuntimeError), match=r"num_select must be in \[1, .* = 5\]; got num_select=8"):
        traced(torch.randn(1, 5, 1, 8))


@every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_a_hook_that_relays_saved_tensors_leaves_the_gradients_right(name, packed):
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    grad_out = torch.randn(2, 9, 2, 8)

    def gradient(unpack):
        with ffvt.use_backend(name), saved_tensors_hooks(lambda t: t, unpack):
            call = ffvt.maws_attention_qkvpacked if packed else lambda t, k: ffvt.maws_attention(*t.unbind(2), k)
            out = call(qkv, 2)[0]
        return torch.autograd.grad(out, qkv, relaid(grad_out))[0]

    torch.testing.assert_close(gradient(relaid), gradient(lambda t: t))


def attention(**change):
    q = torch.zeros(1, 9, 2, 8)
    return {"q": q, "k": q, "v": q, "num_select": 2, "scale": 0.5, "first_candidate": 0} | change


def backward(**change):
    q, line = torch.zeros(1, 9, 2, 8), torch.zeros(1, 2, 9)
    return {"grad_out": q, "q": q, "k": q, "v": q, "out": q, "lse": line, "row_max": line, "scale": 0.5} | change


def packed_backward(**change):
    q, line = torch.zeros(1, 9, 2, 8), torch.zeros(1, 2, 9)
    qkv = torch.zeros(1, 9, 3, 2, 8)
    return {"grad_out": q, "qkv": qkv, "out": q, "lse": line, "row_max": line, "scale": 0.5} | change


SHORT = torch.cat([torch.zeros(1, 3, 2, 8), torch.full((1, 6, 2, 8), torch.nan)], 1)[:, :3]
MISUSED = {
    "k is short": (OURS.maws_attention, attention(k=SHORT), ValueError, "q and k must have one shape"),
    "v is short": (OURS.maws_attention, attention(v=SHORT), ValueError, "q and v must have one shape"),
    "v is of another dtype": (
        OURS.maws_attention,
        attention(v=torch.zeros(1, 9, 2, 8).half()),
        TypeError,
        "q and v must have one dtype",
    ),
    "num_select is too large": (OURS.maws_attention, attention(num_select=200000), ValueError, "got num_select=200000"),
    "num_select is zero": (OURS.maws_attention, attention(num_select=0), ValueError, "got num_select=0"),
    "first_candidate is negative": (
        OURS.maws_attention,
        attention(first_candidate=-1),
        ValueError,
        "first_candidate=-1",
    ),
    "scale is negative": (
        OURS.maws_attention,
        attention(scale=-0.5),
        ValueError,
        "finite and positive; got scale=-0.5",
    ),
    "scale is NaN": (OURS.maws_attention, attention(scale=math.nan), ValueError, "finite and positive; got scale=nan"),
    "no parts": (
        OURS.maws_attention_qkvpacked,
        {"qkv": torch.zeros(1, 9, 2, 2, 8), "num_select": 2, "scale": None, "first_candidate": 0},
        ValueError,
        r"qkv must be \(B, N, 3, H, D\)",
    ),
    "selection: k is short": (
        OURS.maws_select,
        {"q": torch.zeros(1, 9, 2, 8), "k": SHORT, "num_select": 2, "scale": None, "first_candidate": 0},
        ValueError,
        "q and k must have one shape",
    ),
    "backward: k is short": (
        OURS.maws_attention_backward,
        backward(k=SHORT),
        ValueError,
        "q and k must have one shape",
    ),
    "backward: out is short": (OURS.maws_attention_backward, backward(out=SHORT), ValueError, "q and out"),
    "backward: grad_out is short": (
        OURS.maws_attention_backward,
        backward(grad_out=SHORT),
        ValueError,
        "q and grad_out",
    ),
    "backward: lse": (
        OURS.maws_attention_backward,
        backward(lse=torch.zeros(1, 2, 8)),
        ValueError,
        r"lse must be \(B, H, N\); got lse.shape=\(1, 2, 8\)",
    ),
    "backward: row_max": (
        OURS.maws_attention_backward,
        backward(row_max=torch.zeros(0)),
        ValueError,
        "row_max must be",
    ),
    "backward: lse's dtype": (
        OURS.maws_attention_backward,
        backward(lse=torch.zeros(1, 2, 9).double()),
        TypeError,
        "lse must be torch.float32; got lse.dtype=torch.float64",
    ),
    "backward: scale": (OURS.maws_attention_backward, backward(scale=0.0), ValueError, "got scale=0.0"),
    "packed backward: out is short": (
        OURS.maws_attention_qkvpacked_backward,
        packed_backward(out=SHORT),
        ValueError,
        "q and out must have one shape",
    ),
    "packed backward: no parts": (
        OURS.maws_attention_qkvpacked_backward,
        packed_backward(qkv=torch.zeros(1, 9, 2, 2, 8)),
        ValueError,
        r"qkv must be \(B, N, 3, H, D\)",
    ),
    "packed backward: lse": (
        OURS.maws_attention_qkvpacked_backward,
        packed_backward(lse=torch.zeros(2)),
        ValueError,
        "lse must be",
    ),
    "gather: too many picks": (
        OURS.gather_tokens_backward,
        {"grad": torch.zeros(1, 2, 4), "index": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), "num_tokens": 5},
        ValueError,
        "grad and index must have one K",
    ),
    "gather: index past the end": (
        OURS.gather_tokens,
        {"x": torch.zeros(1, 5, 4), "index": torch.tensor([[0, 5]])},
        IndexError,
        "got index=5",
    ),
    "gather: index past the end of the gradient": (
        OURS.gather_tokens_backward,
        {"grad": torch.zeros(1, 2, 4), "index": torch.tensor([[0, 5]]), "num_tokens": 5},
        IndexError,
        "got index=5",
    ),
    "gather: negative index of the gradient": (
        OURS.gather_tokens_backward,
        {"grad": torch.zeros(1, 2, 4), "index": torch.tensor([[0, -1]]), "num_tokens": 5},
        IndexError,
        "got index=-1",
    ),
    "gather: index of int32": (
        OURS.gather_tokens_backward,
        {"grad": torch.zeros(1, 2, 4), "index": torch.zeros(1, 2, dtype=torch.int32), "num_tokens": 5},
        TypeError,
        "index must be int64",
    ),
}


@every_backend
@pytest.mark.parametrize(("operator", "arguments", "error", "message"), MISUSED.values(), ids=MISUSED)
def test_a_misused_operator_says_what_must_hold(operator, arguments, error, message, name):
    with pytest.raises(error, match=message):
        operator(**arguments, backend=name)


def cpp(function, *args):
    return lambda: getattr(_load("cpp"), function)(*args)


Q, LINE = torch.zeros(1, 9, 2, 8), torch.zeros(1, 2, 9)
GRADS = (Q, Q, Q)
IN_CPP = {
    "k is short": ("maws_attention_forward", (Q, SHORT, Q, 2, 0.5, 0), ValueError, "k must be .* with the shape of q"),
    "stride": ("maws_attention_forward", (relaid(Q), Q, Q, 2, 0.5, 0), ValueError, "q must have unit last stride"),
    "dtype": ("maws_attention_forward", (Q, Q.half(), Q, 2, 0.5, 0), TypeError, "k must have the dtype of q"),
    "fp64": ("maws_attention_forward", (*[Q.double()] * 3, 2, 0.5, 0), NotImplementedError, "fp16, bf16 or fp32"),
    "K": ("maws_attention_forward", (Q, Q, Q, 10, 0.5, 0), ValueError, "got num_select=10"),
    "first_candidate": ("maws_attention_forward", (Q, Q, Q, 1, 0.5, 9), ValueError, "got first_candidate=9"),
    "scale": ("maws_attention_forward", (Q, Q, Q, 1, -0.5, 0), ValueError, "finite and positive"),
    "select": ("maws_select_forward", (Q, Q, 10, 0.5, 0), ValueError, "got num_select=10"),
    "select, k is short": ("maws_select_forward", (Q, SHORT, 2, 0.5, 0), ValueError, "k must be"),
    "backward, dq": ("maws_attention_backward", (*[Q] * 5, LINE, LINE, 0.5, (SHORT, Q, Q)), ValueError, "dq must be"),
    "backward, lse": (
        "maws_attention_backward",
        (*[Q] * 5, LINE[..., :3], LINE, 0.5, GRADS),
        ValueError,
        "lse must be",
    ),
    "backward, out": ("maws_attention_backward", (*[Q] * 4, SHORT, LINE, LINE, 0.5, GRADS), ValueError, "out must be"),
    "gather": ("gather_tokens_forward", (LINE, torch.tensor([[2]])), IndexError, "got index=2"),
    "gather, int32": ("gather_tokens_forward", (LINE, torch.zeros(1, 1).int()), TypeError, "index must be int64"),
    "scatter": ("gather_tokens_backward", (LINE, torch.tensor([[0, 9]]), 9), IndexError, "got index=9"),
    "scatter, picks": ("gather_tokens_backward", (LINE, torch.tensor([[0]]), 9), ValueError, "a row for each pick"),
}


@pytest.mark.skipif("cpp" not in EVERY, reason="the C++ kernels are not here")
@pytest.mark.parametrize(("function", "args", "error", "message"), IN_CPP.values(), ids=IN_CPP)
def test_the_extension_s_functions_check_what_they_read(function, args, error, message):
    with pytest.raises(error, match=message):
        cpp(function, *args)()


IMAGES, OUT = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)
JITTER, THREE = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2), torch.zeros(3)
BAD_AUGMENT = {
    "rows": ((IMAGES, JITTER[:1], THREE, THREE, OUT), ValueError, r"jitter must be \(B, 4\)"),
    "factors": ((IMAGES, JITTER[:, :3].contiguous(), THREE, THREE, OUT), ValueError, r"jitter must be \(B, 4\)"),
    "order": ((IMAGES, JITTER + 1e9, THREE, THREE, OUT), ValueError, "orders must be 0 to 5"),
    "NaN": ((IMAGES, JITTER * math.nan, THREE, THREE, OUT), ValueError, "orders must be 0 to 5"),
    "out's strides": ((IMAGES, JITTER, THREE, THREE, OUT.mT), ValueError, "must be on the CPU and contiguous"),
    "out's shape": ((IMAGES, JITTER, THREE, THREE, OUT[:1]), ValueError, r"must be \(B, 3, H, W\)"),
    "out's dtype": ((IMAGES, JITTER, THREE, THREE, OUT.double()), TypeError, "all else fp32"),
    "images' dtype": ((OUT, JITTER, THREE, THREE, OUT), TypeError, "images must be uint8"),
    "channels": ((IMAGES[:, :2].contiguous(), JITTER, THREE, THREE, OUT[:, :2].contiguous()), ValueError, "3, H, W"),
    "scale": ((IMAGES, JITTER, THREE[:2], THREE, OUT), ValueError, r"scale and shift must be \(3,\)"),
}


@pytest.mark.skipif("cpp" not in EVERY, reason="the C++ kernels are not here")
@pytest.mark.parametrize(("args", "error", "message"), BAD_AUGMENT.values(), ids=BAD_AUGMENT)
def test_augment_in_cpp_checks_what_it_reads(args, error, message):
    with pytest.raises(error, match=message):
        cpp("augment", *args)()


def test_integers_and_floats_of_numpy_are_taken(backend):
    q, k, v = heads((1, 9, 2, 8))
    with ffvt.use_backend(backend):
        expected = ffvt.maws_attention(q, k, v, 3, 0.5, 1)
        found = ffvt.maws_attention(q, k, v, np.int64(3), np.float32(0.5), np.uint8(1))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert torch.equal(ffvt.maws_select(q, k, np.int32(3), np.float64(0.5), np.int8(1))[0], expected[1])


def test_no_scale_is_one_over_the_root_of_the_head_dimension(backend):
    q, k, v = heads((1, 9, 2, 16))
    with ffvt.use_backend(backend):
        found, expected = ffvt.maws_attention(q, k, v, 3), ffvt.maws_attention(q, k, v, 3, 0.25)
        grads = [torch.autograd.grad(result[0].sum(), q)[0] for result in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert torch.equal(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_as_many_picks_as_tokens_but_one(strict):
    class Module(torch.nn.Module):
        def forward(self, q):
            return ffvt.maws_attention(q, q, q, q.shape[1] - 1)[1]

    shapes = ({1: torch.export.Dim("n", min=3, max=99)},)
    program = torch.export.export(Module(), (torch.randn(1, 5, 1, 4),), dynamic_shapes=shapes, strict=strict).module()
    q = torch.randn(1, 17, 1, 4)
    assert torch.equal(program(q), Module()(q))


ATTENTION = lambda q: ffvt.maws_attention(q, q, q, 2)[0]  # noqa: E731
FORWARD_MODE = {
    "maws_attention": ATTENTION,
    "maws_attention_qkvpacked": lambda q: ffvt.maws_attention_qkvpacked(torch.stack([q, q, q], 2), 2)[0],
    "maws_select": lambda q: ffvt.maws_select(q, q, 2)[1],
    "gather_tokens": lambda q: ffvt.gather_tokens(q.flatten(2), torch.zeros(1, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("function", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_mode_is_refused(function):
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(NotImplementedError, match="there is no forward-mode gradient"):
        torch.func.jvp(function, (q,), (q,))


@pytest.mark.parametrize("name", ["maws_attention", "maws_attention_qkvpacked", "gather_tokens"])
def test_forward_mode_is_refused_while_compiling(name):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, t: torch.func.jvp(FORWARD_MODE[name], (q,), (t,))[1], fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="there is no forward-mode gradient"):
        compiled(torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4))


def test_a_dual_tensor_given_to_an_operator_itself_is_refused():
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(torch.zeros(1, 5, 1, 4), torch.ones(1, 5, 1, 4))
        with pytest.raises(NotImplementedError, match="maws_attention: q must have no tangent"):
            OURS.maws_attention(q, q, q, 2, None, 0, "")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_gradients_of_torch_func_are_refused_and_never_wrong(transform):
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda q: ATTENTION(q).sum())(torch.randn(1, 5, 1, 4))


@pytest.mark.parametrize("training", [False, True])
def test_pytorch_s_counter_knows_the_operators(training):
    """A model in which every attention is an operator of ours: without feature fusion's pruned last blocks."""
    model = tiny_model(prune_dead_rows=False)
    images = torch.randn(2, 3, 64, 64)
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[2],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, *_, **__: 10 * math.prod(q) * k[2]
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        logits = model(images)
        if training:
            logits.sum().backward()
    assert counter.get_total_flops() == 2 * flops_per_image(model.config, training=training, recomputation=training)
    ours = [operator for operator in counter.get_flop_counts()["Global"] if str(operator).startswith("ffvt.")]
    assert len(ours) == 1 + training


def test_the_counter_s_formulas_are_those_of_the_products():
    q = torch.randn(2, 9, 3, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ffvt.maws_attention(q, q, q, 2)[0].sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3 * 9 * 9 * 8
    with FlopCounterMode(display=False) as counter:
        ffvt.maws_select(q, q, 2)
    assert counter.get_total_flops() == 4 * 2 * 3 * 9 * 8


def test_an_unknown_backend_is_named():
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(ValueError, match="maws_select: backend must be one of triton, .*got backend='x'"):
        torch.ops.ffvt.maws_select(q, q, 2, None, 0, "x")
