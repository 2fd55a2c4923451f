"""The C++ kernels: every set of instructions, numbers of threads, hostile values, and how one is chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffvt
from ffvt.kernels.backends import _missing
from tests.helpers import heads, rms, truth

ROOT = Path(__file__).parents[2]
REASON = "; ".join(_missing("cpp"))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the C++ backend cannot serve: {REASON}")

# What is forced: FFVT_CPU_CAPABILITY, PyTorch's ATEN_CPU_CAPABILITY, and the instructions of oneDNN's products.
FORCED = {
    "avx512_bf16": ("avx512", None),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx2": ("avx2", "AVX2"),
}


def forced(capability: str) -> dict[str, str]:
    aten, onednn = FORCED[capability]
    limits = {"ONEDNN_MAX_CPU_ISA": onednn} if onednn else {}
    return {**os.environ, "FFVT_CPU_CAPABILITY": capability, "ATEN_CPU_CAPABILITY": aten, **limits}


def run_python(code: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_best_capability_of_this_cpu_is_loaded():
    from ffvt.kernels import backend_cpp

    if os.environ.get("FFVT_CPU_CAPABILITY") or os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("a capability is forced")
    assert backend_cpp.facts()["capability"] == backend_cpp.allowed()[0]
    multiplies = backend_cpp.facts()["product_gflops"]["bf16"] > 0
    assert multiplies == ffvt.info()["extension"]["avx512_bf16"]


def test_the_backend_s_functions_are_the_extension_s_own():
    from ffvt.kernels import backend_cpp

    for operator in ("maws_attention", "attention_stats", "attention_vecmat", "maws_select", "gather_tokens"):
        function = f"{operator}_forward"
        assert getattr(backend_cpp, function) is getattr(backend_cpp.KERNELS, function)


@pytest.mark.slow
@pytest.mark.parametrize("capability", FORCED)
def test_the_operators_tests_pass_with_each_capability_forced(capability):
    from ffvt.kernels import backend_cpp

    if os.environ.get("FFVT_CPU_CAPABILITY"):
        pytest.skip("a capability is forced already")
    if capability not in backend_cpp.allowed():
        pytest.skip(f"this CPU has no {capability}")
    shown = "import ffvt; print(ffvt.info()['extension']['capability'], ffvt.info()['devices']['cpu']['serves'])"
    assert run_python(shown, forced(capability)) == f"{capability} cpp"
    files = [
        f"tests/kernels/test_{name}.py"
        for name in ("maws_attention", "attention_stats_cpp", "gather_tokens", "registration", "backend_cpp")
    ] + ["tests/data/test_transforms.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cpp and not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=forced(capability), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FFVT_CPU_CAPABILITY", "sse9", "must be one of avx512_bf16, avx512, avx2; got 'sse9'"),
        ("ATEN_CPU_CAPABILITY", "default", "need x86 with AVX2; got .*PyTorch uses DEFAULT"),
        ("FFVT_CPU_PRODUCTS", "half", "FFVT_CPU_PRODUCTS: products must be bf16, fp32 or auto; got half"),
        pytest.param(
            *("FFVT_CPU_PRODUCTS", "bf16", "FFVT_CPU_PRODUCTS: .* this build does not multiply bf16, or .*; got bf16"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_capability_that_cannot_be_had_is_named(variable, value, message):
    env = {**os.environ, "FFVT_CPU_CAPABILITY": "avx2", variable: value}
    code = "import ffvt; info = ffvt.info(); print(info['backends']['cpp'], info['devices']['cpu']['serves'])"
    shown = run_python(code, env)
    assert re.search(message, shown)
    assert shown.endswith("torch")


@pytest.fixture
def force_products():
    """Forces the operands of bf16 products, and gives the choice back."""
    from ffvt.kernels import backend_cpp

    yield backend_cpp.force_products
    backend_cpp.force_products(os.environ.get("FFVT_CPU_PRODUCTS", "auto"))


def served_products():
    from ffvt.kernels import backend_cpp

    return ("bf16", "fp32") if backend_cpp.facts()["product_gflops"]["bf16"] else ("fp32",)


def test_bf16_is_multiplied_with_the_operands_that_are_faster_here(force_products):
    from ffvt.kernels import backend_cpp

    force_products("auto")
    rates = backend_cpp.facts()["product_gflops"]
    assert rates["fp32"] > 0
    assert backend_cpp.products() == max(rates, key=rates.get)
    assert backend_cpp.facts()["product_gflops"] == rates  # measured once


def test_operands_are_forced_until_they_are_forced_anew(force_products):
    from ffvt.kernels import backend_cpp

    for operands in served_products():
        force_products(operands)
        assert backend_cpp.products() == operands == ffvt.info()["extension"]["bf16_products"]


def test_either_operands_give_the_truth_to_bf16_and_the_wider_ones_are_no_worse(force_products):
    q, k, v = heads((1, 300, 2, 64), torch.bfloat16)
    grad_out = torch.randn(q.shape).bfloat16()
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = truth(*wide, 0.125)[0]
    expected = (out, *torch.autograd.grad(out, wide, grad_out.double()))
    errors = {}
    for operands in served_products():
        force_products(operands)
        runs = []
        for _ in range(2):
            with ffvt.use_backend("cpp"):
                found = ffvt.maws_attention(q, k, v, 12)[0]
            runs.append((found, *torch.autograd.grad(found, (q, k, v), grad_out)))
        assert all(torch.equal(a, b) for a, b in zip(*runs))
        errors[operands] = [rms(mine, true) / rms(0 * true, true) for mine, true in zip(runs[0], expected)]
        assert max(errors[operands]) < 1e-2
    narrow, widened = errors.get("bf16", errors["fp32"]), errors["fp32"]
    assert all(mine <= theirs for mine, theirs in zip(widened, narrow))


@pytest.mark.parametrize("value", ["fp16", "BF16", "none"])
def test_other_operands_are_refused_by_name(value):
    from ffvt.kernels import backend_cpp

    with pytest.raises(ValueError, match=f"products must be bf16, fp32 or auto; got {value}"):
        backend_cpp.force_products(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_threads_that_share_a_head_s_operands_give_the_bits_of_one_thread(dtype):
    q, k, v = heads((1, 457, 1, 40), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ffvt.use_backend("cpp"):
                results.append(ffvt.maws_attention(q, k, v, 12))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads_gives_the_truth_again_and_again(threads, dtype):
    """One head and 1,025 tokens: more threads than heads, so that a head is split, and its parts of dq are added."""
    before = torch.get_num_threads()
    q, k, v = heads((1, 1025, 1, 32), dtype)
    grad_out = torch.randn(q.shape).to(dtype)
    try:
        torch.set_num_threads(threads)
        with ffvt.use_backend("cpp"):
            runs = [ffvt.maws_attention(q, k, v, 12) for _ in range(2)]
            grads = [torch.autograd.grad(run[0], (q, k, v), grad_out) for run in runs]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = truth(*wide, 32**-0.5)[0]
    share = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert rms(runs[0][0], expected) <= share * expected.square().mean().sqrt()
    for mine, true in zip(grads[0], torch.autograd.grad(expected, wide, grad_out.double())):
        assert rms(mine, true) <= share * true.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 3, 31, 33, 65, 80, 127, 130, 200])
@pytest.mark.parametrize("tokens", [1, 15, 33, 65, 257])
def test_odd_shapes_agree_with_the_reference(tokens, head_dim, dtype):
    inputs = [t.detach().requires_grad_() for t in heads((1, tokens, 2, head_dim), dtype)]
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    found = {}
    for backend in ("cpp", "reference"):
        with ffvt.use_backend(backend):
            out = ffvt.maws_attention(*inputs, 1)[0]
            found[backend] = (out, *torch.autograd.grad(out, inputs, grad_out))
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(found["cpp"], found["reference"], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [20, 300])
def test_a_key_of_minus_infinity_leaves_the_others_their_finite_gradients(tokens, dtype):
    q, k, v = (t.detach() for t in heads((1, tokens, 1, 8), dtype))
    q.abs_()
    k[0, 5] = -torch.inf
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with ffvt.use_backend("cpp"):
        out = ffvt.maws_attention(*inputs, 3)[0]
        dq, dk, dv = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert out.isfinite().all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()
    assert dq.isnan().all()  # zero times infinity, as in the truth


@pytest.mark.parametrize("scale", [1e9, 1e30, 2e38])
def test_logits_of_any_size_give_the_value_of_the_largest(scale):
    q, k, v = (t.detach() for t in heads((1, 300, 2, 16)))
    with ffvt.use_backend("cpp"):
        out = ffvt.maws_attention(q, k, v, 3, scale=scale)[0]
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    best = logits.argmax(-1)  # (B, H, N)
    expected = v.permute(0, 2, 1, 3).gather(2, best[..., None].expand(-1, -1, -1, 16)).transpose(1, 2)
    torch.testing.assert_close(out, expected)


HALF_ULP = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
LARGE = [1e2, 1e4, 1e6, 1e8, 1e30]


def large_gradients(backend, inputs, grad_out, scale):
    with ffvt.use_backend(backend):
        return torch.autograd.grad(ffvt.maws_attention(*inputs, 1, scale)[0], inputs, grad_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logit", LARGE)
def test_equal_logits_of_any_size_share_the_gradient_equally(logit, dtype):
    q = torch.ones(1, 300, 1, 64, dtype=dtype)
    inputs = [q.clone().requires_grad_(), q.clone().requires_grad_(), torch.randn_like(q).requires_grad_()]
    dv = large_gradients("cpp", inputs, torch.ones_like(q), logit / 64)[2]
    tolerance = dict(rtol=1e-5, atol=0) if dtype == torch.float32 else dict(rtol=1e-2, atol=0)
    torch.testing.assert_close(dv, torch.ones_like(dv), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("logit", LARGE)
def test_the_gradients_of_large_logits_are_as_right_as_the_reference_s(logit, tokens, dtype):
    inputs = [t.detach().requires_grad_() for t in heads((1, tokens, 2, 64), dtype)]
    grad_out, scale = torch.randn(inputs[0].shape).to(dtype), logit / 64
    found = large_gradients("cpp", inputs, grad_out, scale)
    plain = large_gradients("reference", inputs, grad_out, scale)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(truth(*wide, scale)[0], wide, grad_out.double())
    share = 1e-4 if dtype == torch.float32 else 1e-2
    for name, mine, theirs, true in zip(("dq", "dk", "dv"), found, plain, expected):
        # dq and dk of a row that is nearly one value have scale times the rounding of `out`, by way of delta
        rounding = 0 if name == "dv" else 4 * HALF_ULP[dtype] * scale * (64**0.5 * 1.5) * 1.5
        assert rms(mine, true) <= max(share * rms(0 * true, true), 2 * rms(theirs, true)) + rounding, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 33, 64, 80, 200])
def test_a_row_that_is_one_value_gives_no_gradient_to_q_and_k(head_dim, dtype):
    """However large the scale: delta and what it is taken from have the same bits."""
    tokens = 90
    q = torch.randn(1, tokens, 1, head_dim).sign().to(dtype)
    k = q.clone()
    k[..., 1:] = 0
    k[..., 0] = torch.arange(tokens)[:, None]  # logits 0 to 89 and 0 to -89: each row has one clear maximum
    inputs = [t.requires_grad_() for t in (q, k, torch.randn(q.shape).to(dtype))]
    dq, dk, dv = large_gradients("cpp", inputs, torch.randn(q.shape).to(dtype), 1e12)
    assert not dq.any()
    assert not dk.any()
    assert dv.abs().max() > 0


INFINITE = {
    "a key": ("k", 1, torch.inf),
    "the class key": ("k", 0, torch.inf),
    "a query": ("q", 1, torch.inf),
    "all keys": ("k", slice(None), -torch.inf),
    "a late key": ("k", -1, torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 20, 300])
@pytest.mark.parametrize(("name", "token", "value"), INFINITE.values(), ids=INFINITE)
def test_infinite_logits_give_nan_where_the_reference_does(name, token, value, tokens, dtype):
    tensors = {key: torch.rand(1, tokens, 1, 8).to(dtype) + 0.1 for key in "qkv"}
    tensors[name][:, token] = value
    inputs = [t.requires_grad_() for t in tensors.values()]
    found = {}
    for backend in ("cpp", "reference"):
        with ffvt.use_backend(backend):
            out = ffvt.maws_attention(*inputs, 1)[0]
            found[backend] = (out, *torch.autograd.grad(out, inputs, torch.ones_like(out)))
    for result, mine, theirs in zip(("out", "dq", "dk", "dv"), found["cpp"], found["reference"]):
        assert torch.equal(mine.isnan(), theirs.isnan()), result


MEMORY = """
import torch, ffvt
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def step(tokens):
    q = torch.randn(1, tokens, 2, 64).requires_grad_()
    ffvt.maws_attention(q, q, q, 1)[0].sum().backward()
step(1100); step(1100)
before = resident()
for tokens in range(100, 1100, 7): step(tokens)
after = resident()
for tokens in range(103, 1100, 7): step(tokens)
print(after - before, resident() - after)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_for_new_numbers_of_tokens_is_bounded():
    """oneDNN keeps the code of its products, per shape; the shapes are few."""
    first, others = map(float, run_python(MEMORY, dict(os.environ)).split())
    assert first < 60  # MiB
    assert others < 6  # 143 numbers of tokens that were not there before


def test_bf16_is_widened_where_oneDNN_is_switched_off_and_only_there():
    code = (
        "import torch, ffvt\n"
        "q = torch.randn(1, 70, 2, 32).bfloat16()\n"
        "with ffvt.use_backend('cpp'):\n"
        "    with torch.backends.mkldnn.flags(enabled=False):\n"
        "        off = ffvt.maws_attention(q, q, q, 3)[0]\n"
        "    on = ffvt.maws_attention(q, q, q, 3)[0]\n"
        "torch.testing.assert_close(off, on, rtol=2e-2, atol=2e-2)\n"
        "print(ffvt.info()['extension']['bf16_products'])"
    )
    assert run_python(code, dict(os.environ)) == ffvt.info()["extension"]["bf16_products"]


def test_an_index_changed_before_the_backward_is_refused():
    x = torch.randn(1, 4, 2, requires_grad=True)
    index = torch.tensor([[1, 2]])
    with ffvt.use_backend("cpp"):
        tokens = ffvt.gather_tokens(x, index)
        index.data[0, 0] = 10_000_000
        with pytest.raises(IndexError, match="got index=10000000"):
            tokens.sum().backward()
