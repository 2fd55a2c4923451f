"""The Triton backend: what it refuses and why, and where it launches."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import ffvt

pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import backend_triton

LIMITS = {
    "head dimension must be at most 128; got D=160": torch.empty(1, 3, 1, 160),
    "number of tokens must be at most 8192; got N=8193": torch.empty(1, 8193, 1, 1),
    "one image must lie within": torch.empty_strided((1, 3, 1, 2), (1, 2**31, 1, 1), device="meta"),
}
Q, LINE = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
X, INDEX = torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.int64)
CALLS = {
    "attention_stats_forward": (Q, Q, Q, 0.5),
    "attention_vecmat_forward": (LINE, Q, Q, None, 0.5),
    "maws_attention_forward": (Q, Q, Q, 2, 0.5, 0),
    "maws_attention_backward": (Q, Q, Q, Q, Q, LINE, LINE, 0.5, tuple(torch.empty_like(Q) for _ in range(3))),
    "maws_select_forward": (Q, Q, 2, 0.5, 0),
    "gather_tokens_forward": (X, INDEX),
    "gather_tokens_backward": (X[:, :2], INDEX, 3),
}


@pytest.mark.parametrize(("message", "tensor"), LIMITS.items(), ids=LIMITS)
def test_a_limit_is_a_reason(message, tensor):
    assert any(message in reason for reason in backend_triton.unsupported("maws_attention", *[tensor] * 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors lie on the CPU, for Triton's interpreter")
def test_a_limit_is_named_before_anything_runs():
    with ffvt.use_backend("triton"), pytest.raises(NotImplementedError, match="head dimension must be at most 128"):
        ffvt.maws_select(torch.zeros(1, 3, 1, 160), torch.zeros(1, 3, 1, 160), 1)


def test_without_a_gpu_and_the_interpreter_triton_says_why():
    code = (
        "import torch, ffvt\n"
        "print(ffvt.info()['backends']['triton'])\n"
        "with ffvt.use_backend('triton'): ffvt.maws_select(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 1)"
    )
    variables = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert "no CUDA or ROCm device" in ran.stdout
    assert ran.stderr.splitlines()[-1].startswith("NotImplementedError: maws_select: backend 'triton' cannot serve")
    assert "got cpu (TRITON_INTERPRET=1 serves it" in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors lie on the CPU, for Triton's interpreter")
@pytest.mark.parametrize(("name", "arguments"), CALLS.items(), ids=CALLS)
def test_every_kernel_is_launched_with_the_device_of_its_tensors_as_the_current_one(monkeypatch, name, arguments):
    """Triton launches on the current device; `ffvt.use_backend` on a machine of several GPUs relies on this."""
    from triton.runtime.interpreter import GridExecutor

    entered, launched, run = [], [], GridExecutor.__call__

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.remove(tensor)

    def launch(*given, **named):
        launched.append([any(tensor is given for given in arguments) for tensor in entered])
        return run(*given, **named)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    getattr(backend_triton, name)(*arguments)
    assert launched
    assert all(current == [True] for current in launched)
