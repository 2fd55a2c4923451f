"""What the Triton kernels promise beyond the operators' own tests: both forms, limits, one configuration for any number
of tokens, the compiler's report, the GPU report's dry run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffvt
from ffvt.kernels import tuning
from tests.helpers import explicit, heads, rms, truth

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="Triton is not installed")

from ffvt.kernels import backend_triton, maws_select_triton, tiles_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.filterwarnings("default")
SMALL = tuning.Row(tuning.ANY, 4, 128, True, 32, 16, 4, 1, "tests: several blocks, and a tail of its own")


@pytest.fixture(autouse=True)
def _on_triton():
    with torch.device(DEVICE), ffvt.use_backend("triton"):
        yield


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 33, 50, 65, 81])
@pytest.mark.parametrize("class_split", [True, False], ids=["class split", "tail mask"])
def test_both_forms_agree_with_the_truth_around_every_tile_edge(monkeypatch, tokens, class_split):
    for kernel in tuning.TABLES:
        monkeypatch.setitem(tuning.TABLES, kernel, (SMALL._replace(class_split=class_split),))
    shape = (2, tokens, 2, 20)
    q, k, v = heads(shape)
    out, _, score = ffvt.maws_attention(q, k, v, min(4, tokens))
    expected, expected_score = truth(q, k, v, 20**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.double(), expected_score, rtol=2e-5, atol=0)
    grad = torch.randn_like(out)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    theirs = torch.autograd.grad(truth(*wide, 20**-0.5)[0], wide, grad.double())
    for mine, true in zip(torch.autograd.grad(out, (q, k, v), grad), theirs):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5)


@on_gpu
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_finite_scale_is_served(scale):
    q, k, v = heads((1, 39, 2, 16))
    out, index, _ = ffvt.maws_attention(q, k, v, 3, scale=scale)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = truth(*wide, scale)[0]
    assert rms(out, expected) <= 2 * rms(explicit(q, k, v, scale), expected) + 1e-7
    for mine, true in zip(found, torch.autograd.grad(expected, wide, grad.double())):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)
    if scale == 0.0:
        assert index.tolist() == [[0, 1, 2]]


@on_gpu
def test_a_broadcast_gradient_and_batch_are_served():
    q, k, v = (t.detach() for t in heads((1, 21, 2, 16)))
    wide = [t.expand(3, -1, -1, -1).requires_grad_() for t in (q, k, v)]  # batch stride 0
    single = [t.clone().requires_grad_() for t in (q, k, v)]
    many = torch.autograd.grad(ffvt.maws_attention(*wide, 2)[0].sum(), wide)  # a gradient of stride 0
    one = torch.autograd.grad(ffvt.maws_attention(*single, 2)[0].sum(), single)
    for mine, theirs in zip(many, one):
        assert torch.equal(mine, theirs.expand_as(mine))


@on_gpu
@pytest.mark.parametrize("tokens", [3, 64, 100, 1025])
def test_selection_orders_ties_and_nan_as_the_reference(tokens):
    values = torch.randint(0, 5, (3, 1, tokens)).float()  # many ties
    values[1, 0, ::3] = torch.nan
    row = values.clone()
    num_selects = [k for k in (1, 13, tokens) if k <= min(tokens, 100)]
    score = ffvt.reference.maws_score(row.cpu(), torch.zeros(3, 1, tokens, device="cpu"))
    for num_select in num_selects:
        index, found = maws_select_triton.pick(row, torch.zeros_like(row), num_select, 0)
        expected = ffvt.reference.select_top(found.cpu(), num_select, 0)
        assert torch.equal(index.cpu(), expected)
        torch.testing.assert_close(found.cpu(), score, equal_nan=True)
        late = min(2, tokens - num_select)
        index = maws_select_triton.pick(row, torch.zeros_like(row), num_select, late)[0]
        assert torch.equal(index.cpu(), ffvt.reference.select_top(found.cpu(), num_select, late))


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity on purpose, in the interpreter's NumPy
def test_keys_of_infinite_logits_weigh_nothing():
    q, k, v = (t.detach() for t in heads((1, 100, 2, 16)))
    q, k = q.abs(), k.clone()
    k[:, 1:70] = -torch.inf  # more than the first block of keys
    for last in (False, True):
        k[:, 0] = -torch.inf if last else 0.1
        found, _, score = ffvt.maws_attention(q, k, v, 3)
        expected, _, expected_score = ffvt.reference.maws_attention(q, k, v, 3)
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(score, expected_score, equal_nan=True)
    k = k.requires_grad_()
    v = v.requires_grad_()
    grads = torch.autograd.grad(ffvt.maws_attention(q, k, v, 3)[0].square().sum(), (k, v))
    with ffvt.use_backend("reference"):
        theirs = torch.autograd.grad(ffvt.maws_attention(q, k, v, 3)[0].square().sum(), (k, v))
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-4)


@on_gpu
def test_the_limits_are_said_before_anything_runs():
    cases = {
        "head dimension must be at most 128; got D=160": torch.zeros(1, 3, 1, 160),
        "number of tokens must be at most 8192; got N=8193": torch.zeros(1, 8193, 1, 1),
        "one image must lie within": torch.empty_strided((1, 3, 1, 2), (1, 2**31, 1, 1), device="meta"),
    }
    for message, tensor in cases.items():
        assert any(message in reason for reason in backend_triton.unsupported("maws_attention", *[tensor] * 3)), message
    with pytest.raises(NotImplementedError, match="head dimension must be at most 128"):
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


def test_head_dimensions_are_not_padded_to_the_next_power_of_two():
    assert {d: tiles_triton.head_blocks(d) for d in (1, 16, 32, 48, 64, 72, 80, 96, 128)} == {
        1: (16, 0),
        16: (16, 0),
        32: (32, 0),
        48: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        96: (64, 32),
        128: (128, 0),
    }


def test_the_configuration_depends_on_neither_the_number_of_tokens_nor_the_picks():
    parameters = tuning.attention.__annotations__
    assert set(parameters) == {"kernel", "arch", "element_size", "head_dim", "return"}
    selections = {str(tuning.select("sm_90", n, k)) for n in range(513, 1025) for k in (9, 12, 16)}
    assert len(selections) == 1


@pytest.mark.parametrize("kernel", tuning.TABLES)
def test_every_row_of_the_table_can_be_reached_and_says_why(kernel):
    reached = {
        tuning.find(kernel, arch, size, dim)
        for arch in ("interpreter", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "sm_120")
        for size in (2, 4)
        for dim in range(1, 129)
    }
    assert reached == set(tuning.TABLES[kernel])
    assert all(row.reason for row in reached)


def test_the_grid_covers_every_token_once():
    for row in (SMALL, SMALL._replace(class_split=False)):
        for tokens in (1, 2, 32, 33, 34, 64, 65):
            (programs,) = tuning.configure("forward", row).grid(tokens, 1)
            assert programs == (math.ceil((tokens - 1) / 32) + 1 if row.class_split else math.ceil(tokens / 32))


COMPILER = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def compile_all(variables, *arguments):
    command = [sys.executable, "-m", "benchmarks.static_report", "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)


@pytest.mark.slow
def test_every_shipped_configuration_compiles_ahead_of_time_without_spills_as_recorded():
    if not (ROOT / "benchmarks" / "results" / f"static-triton-{triton.__version__}.json").exists():
        pytest.skip(f"no report of Triton {triton.__version__} is recorded to compare with")
    ran = compile_all(COMPILER)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert " 0 problems" in ran.stdout


@pytest.mark.slow
def test_the_oldest_triton_compiles_them_too():
    """Triton 3.6.0, set up beside the environment by `make test`: the 16-bit kernels of one NVIDIA and one AMD GPU."""
    old = Path(sys.prefix) / "triton-3.6.0"
    if not old.exists():
        pytest.skip("Triton 3.6.0 is not set up beside the environment; make test does it")
    variables = {**COMPILER, "PYTHONPATH": f"{old}{os.pathsep}{ROOT}"}
    ran = compile_all(variables, "--architectures", "sm_90", "gfx942", "--dtypes", "fp16")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Triton 3.6.0" in ran.stdout


def test_the_recorded_reports_hold_matrix_instructions_and_no_spill():
    for version in ("3.6.0", "3.8.0"):
        records = json.loads((ROOT / "benchmarks" / "results" / f"static-triton-{version}.json").read_text())
        assert {record["architecture"] for record in records} == {
            *("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"),
        }
        for record in records:
            attention = record["name"] in ("forward", "query_gradient", "key_gradient")
            assert record["spilled_bytes"] == 0, record
            assert record["programs_per_multiprocessor"] >= 1, record
            if attention and record["dtype"] != "fp32":
                expected = {"sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}.get(record["architecture"])
                assert expected is None or expected in record["matrix_instructions"], record
                assert record["matrix_instructions"], record


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is of machines without a GPU")
def test_the_gpu_report_runs_dry(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--dry_run", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    sections = {record["benchmark"].removeprefix("gpu_") for record in records}
    assert sections == {"tests", "accuracy", "ceilings", "attention", "selection", "variants", "model"}
    timed = [r for r in records if r["benchmark"] == "gpu_attention" and "time_ms" in r]
    assert {(r["case"], r["mode"]) for r in timed} >= {
        (case, mode) for case in ("ours", "authors' eager", "SDPA flash") for mode in ("forward", "backward", "step")
    }
    assert "| 1, 19, 2, 64 | fp16 | forward | eager, hot |" in (tmp_path / "summary.md").read_text()
