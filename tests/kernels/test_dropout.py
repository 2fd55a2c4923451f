"""Dropout without a mask: the same bits from every backend, chance that is chance, a gradient through the same mask."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ffvt
from ffvt.kernels.ops import dropout
from ffvt.model.layers import Dropout
from tests.helpers import skip_unserved

SEED = torch.tensor(-(2**62) + 12345)
MASK, LATE = (
    0b11110000011001100000,
    532,
)  # what stays at p = 1/2: of one seed's first 20, and how many of another's
run = torch.ops.ffvt.dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (255,), (256,), (257, 1), (3, 5, 7, 11), (2, 70_000)], ids=str)
def test_every_backend_gives_the_bits_of_the_reference(backend, shape, dtype):
    skip_unserved(backend, dtype)
    x = torch.randn(shape).to(dtype)
    found = run(x, SEED, 0.3, backend)
    assert found.dtype == dtype
    assert torch.equal(found, run(x, SEED, 0.3, "reference"))


@pytest.mark.parametrize("p", [1e-6, 0.31619669952159346, 0.4, 0.45056310663115, 0.98, 1 - 1e-9])
def test_what_stays_is_multiplied_by_the_same_number_at_every_p(backend, p):
    """1 / (1 - p) rounded to fp32 once: dividing by 1 - p in fp32 gives other bits at a fifth of all p."""
    x = torch.randn(2000)
    found = run(x, SEED, p, backend)
    assert torch.equal(found, torch.where(found != 0, x * torch.tensor(1 / (1 - p)), 0.0))


def test_the_masks_of_a_seed_stay_what_they_are(backend):
    """A resumed run must go on with the masks of the version that it was begun with."""
    kept = run(torch.ones(20), torch.tensor(42, device="cpu"), 0.5, backend).bool().int().tolist()
    assert kept == [MASK >> i & 1 for i in range(20)]
    late = run(torch.ones(1024), torch.tensor(2**40 + 7, device="cpu"), 0.5, backend).bool()
    assert late.sum() == LATE


def test_what_stays_is_divided_by_its_share_and_the_rest_is_zero(backend):
    x = torch.randn(1000) + 10
    out = run(x, SEED, 0.25, backend)
    stays = out != 0
    torch.testing.assert_close(out[stays], x[stays] / 0.75)
    assert 650 < stays.sum() < 850


def test_nothing_is_dropped_at_zero(backend):
    x = torch.randn(300)
    assert torch.equal(run(x, SEED, 0.0, backend), x)


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.97])
def test_the_share_is_p_along_every_stride(p):
    """Within five standard deviations: in all, in every column, and in what two neighbours both lose."""
    ones, draws = torch.ones(2048, 768), []
    for seed in (0, 1, 2**33, -1):
        lost = run(ones, torch.tensor(seed), p, "cpp" if not ffvt.kernels.backends._missing("cpp") else "torch") == 0
        draws.append(lost)
        for share, count, expected in [
            (lost.double().mean(), lost.numel(), p),
            ((lost[:, 1:] & lost[:, :-1]).double().mean(), lost.numel(), p * p),
            ((lost[1:] & lost[:-1]).double().mean(), lost.numel(), p * p),
        ]:
            assert abs(share - expected) < 5 * math.sqrt(expected / count)
        columns = lost.double().mean(0)
        assert (columns - p).abs().max() < 6 * math.sqrt(p / 2048) + 3 / 2048
    both = (draws[0] & draws[1]).double().mean()
    assert abs(both - p * p) < 5 * math.sqrt(p * p / ones.numel())


def test_the_gradient_goes_through_the_same_mask_and_nothing_else_is_kept(backend):
    x = torch.randn(4, 300, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = run(x, SEED, 0.4, backend)
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.int64, 1)]
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (out != 0) / 0.6)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_gradcheck_twice(name):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: run(t, SEED, 0.3, name), x)
    assert torch.autograd.gradgradcheck(lambda t: run(t, SEED, 0.3, name), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    skip_unserved(backend, dtype)
    x = torch.randn(3, 40).to(dtype).requires_grad_()
    torch.library.opcheck(run, (x, SEED, 0.3, backend))


def test_strides_do_not_matter(backend):
    x = torch.randn(7, 5, 300).transpose(0, 2)
    assert torch.equal(run(x, SEED, 0.3, backend), run(x.contiguous(), SEED, 0.3, backend))


def test_threads_do_not_matter():
    x, before, results = torch.randn(300_001), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run(x, SEED, 0.3, ""))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_generator_s_state_decides_the_masks():
    x = torch.ones(2000)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(dropout(x, 0.5), second)


def test_activation_checkpointing_makes_the_mask_again():
    x = torch.randn(500, requires_grad=True)
    state = torch.get_rng_state()
    out = checkpoint(lambda t: dropout(t.sin(), 0.5), x, use_reentrant=False)
    (again,) = torch.autograd.grad(out.sum(), x)
    torch.set_rng_state(state)
    (once,) = torch.autograd.grad(dropout(x.sin(), 0.5).sum(), x)
    assert torch.equal(again, once)


def test_compiles_in_one_graph():
    def step(x):
        return dropout(x, 0.5).sin()

    x = torch.randn(400, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = torch.get_rng_state()
    out = compiled(x)
    torch.set_rng_state(state)
    assert torch.equal(out, step(x))


def test_the_module_drops_in_training_alone_and_by_our_own_operator_only_where_it_is_faster():
    module, x = Dropout(0.5), torch.ones(3000)
    assert module.eval()(x) is x
    module.train()
    for forced, expected in (("cpp", dropout), ("torch", torch.nn.functional.dropout)):
        if forced == "cpp" and ffvt.kernels.backends._missing("cpp"):
            continue
        with ffvt.use_backend(forced):
            state = torch.get_rng_state()
            found = module(x)
            torch.set_rng_state(state)
            assert torch.equal(found, expected(x, 0.5))
    assert module(x.double()).dtype == torch.float64


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_outside_is_named(p):
    with pytest.raises(ValueError, match=r"^dropout: p must be in \[0, 1\); got p="):
        dropout(torch.ones(3), p)


@pytest.mark.parametrize(
    ("x", "seed", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), SEED, TypeError, "x must be one of .*; got x.dtype=torch.int64"),
        (torch.ones(3), torch.tensor(0.5), ValueError, "seed must be one int64 on the CPU; got .*torch.float32"),
        (torch.ones(3), torch.tensor([1, 2]), ValueError, "seed must be one int64 on the CPU; got .*\\(2,\\)"),
    ],
)
def test_other_arguments_are_named(x, seed, error, message):
    with pytest.raises(error, match=f"^dropout: {message}"):
        run(x, seed, 0.5, "")


def test_a_forward_mode_gradient_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="dropout"):
            dropout(dual, 0.5)
