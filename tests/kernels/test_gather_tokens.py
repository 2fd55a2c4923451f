"""gather_tokens: rows, gradients, repeated picks, bad input."""

import pytest
import torch

import ffvt
from tests.helpers import skip_unserved


def sample(batch=3, tokens=11, channels=5, picks=4, dtype=torch.float32):
    x = torch.randn(batch, tokens, channels).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(tokens)[:picks] for _ in range(batch)])
    return x, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_copied_exactly(backend, dtype):
    skip_unserved(backend, dtype)
    x, index = sample(dtype=dtype)
    with ffvt.use_backend(backend):
        tokens = ffvt.gather_tokens(x, index)
    for image in range(3):
        for place in range(4):
            assert torch.equal(tokens[image, place], x[image, index[image, place]])
    assert tokens.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_reaches_the_picked_rows_only(backend, dtype):
    skip_unserved(backend, dtype)
    x, index = sample(dtype=dtype)
    grad = torch.randn(3, 4, 5).to(dtype)
    with ffvt.use_backend(backend):
        (found,) = torch.autograd.grad(ffvt.gather_tokens(x, index), x, grad)
    expected = torch.zeros_like(x).scatter(1, index[..., None].expand(-1, -1, 5), grad)
    assert torch.equal(found, expected)


def test_a_repeated_pick_receives_the_sum(backend):
    x = torch.randn(1, 4, 2, requires_grad=True)
    index = torch.tensor([[2, 0, 2]])
    with ffvt.use_backend(backend):
        ffvt.gather_tokens(x, index).backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]]]))
    assert x.grad.tolist() == [[[3.0, 4.0], [0.0, 0.0], [11.0, 22.0], [0.0, 0.0]]]


def test_strided_input_and_one_token(backend):
    x = torch.randn(5, 7, 2).permute(2, 1, 0).requires_grad_()  # (2, 7, 5)
    index = torch.tensor([[6], [0]])
    with ffvt.use_backend(backend):
        tokens = ffvt.gather_tokens(x, index)
    assert torch.equal(tokens[:, 0], torch.stack([x[0, 6], x[1, 0]]))


def test_operator_checks(backend):
    dtype = torch.float32 if backend in ("triton", "cpp") else torch.float64
    x, index = sample(dtype=dtype)
    torch.library.opcheck(torch.ops.ffvt.gather_tokens, (x, index, backend))
    grad = torch.randn(3, 4, 5)
    torch.library.opcheck(torch.ops.ffvt.gather_tokens_backward, (grad, index, 11, backend))
    with ffvt.use_backend(backend):
        if dtype == torch.float64:
            assert torch.autograd.gradcheck(lambda x: ffvt.gather_tokens(x, index), x)
        compiled = torch.compile(ffvt.gather_tokens, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, index), ffvt.gather_tokens(x, index))


BAD = {
    "index dtype": (torch.zeros(2, 5, 3), torch.zeros(2, 1, dtype=torch.int32), TypeError, "index.dtype=torch.int32"),
    "x dtype": (torch.zeros(2, 5, 3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), TypeError, "x.dtype"),
    "rank": (torch.zeros(5, 3), torch.zeros(2, 1, dtype=torch.int64), ValueError, r"x.shape=\(5, 3\)"),
    "batch": (torch.zeros(2, 5, 3), torch.zeros(3, 1, dtype=torch.int64), ValueError, r"index.shape=\(3, 1\)"),
    "past the end": (torch.zeros(1, 5, 3), torch.tensor([[1, 5]]), IndexError, "got index=5"),
    "negative": (torch.zeros(1, 5, 3), torch.tensor([[-1, 0]]), IndexError, "got index=-1"),
    "device": (
        torch.zeros(1, 5, 3),
        torch.zeros(1, 1, dtype=torch.int64, device="meta"),
        ValueError,
        "index.device=meta",
    ),
}


@pytest.mark.parametrize(("x", "index", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(backend, x, index, error, message):
    x, index = (t if t.device.type == "meta" else t.to(torch.get_default_device()) for t in (x, index))
    if error is IndexError and x.device.type == "cuda":
        pytest.skip("a GPU's index is not read back; see the next test")
    with ffvt.use_backend(backend), pytest.raises(error, match=message):
        ffvt.gather_tokens(x, index)


def test_an_index_outside_gives_nan_where_it_cannot_raise(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("PyTorch's gather stops the program on a GPU, and raises on a CPU")
    from ffvt.kernels import gather_tokens_triton

    monkeypatch.setattr(gather_tokens_triton, "check_index_range", lambda index, num_tokens: None)
    x = torch.randn(2, 3, 5)
    with ffvt.use_backend(backend):
        tokens = ffvt.gather_tokens(x, torch.tensor([[0, 3], [-1, 2]]))
    assert tokens.isnan().all(-1).tolist() == [[False, True], [True, False]]
    assert torch.equal(tokens[1, 1], x[1, 2])
