"""The compiler's report: every kernel compiles ahead of time for every GPU, without spills, as recorded."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from benchmarks import static_jobs, static_report  # noqa: E402
from ffvt.kernels import maws_attention_triton, tiles_triton  # noqa: E402

ROOT = Path(__file__).parents[2]
COMPILER = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
RECORDED = ("3.6.0", "3.8.0")
recorded_now = pytest.mark.skipif(
    not (static_report.RESULTS / f"static-triton-{triton.__version__}.json").exists(),
    reason=f"no report of Triton {triton.__version__} is recorded to compare with",
)


def read(version):
    return json.loads((static_report.RESULTS / f"static-triton-{version}.json").read_text())


def check(variables, *arguments):
    command = [sys.executable, "-m", "benchmarks.static_report", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert " 0 problems" in ran.stdout
    return ran.stdout


@recorded_now
def test_every_kernel_and_whatever_changed_compiles_without_spills_as_recorded():
    check(COMPILER, "--quick")


@pytest.mark.slow
@recorded_now
def test_every_shipped_configuration_compiles_without_spills_as_recorded():
    check(COMPILER, "--check")


@pytest.mark.slow
def test_the_oldest_triton_compiles_them_too():
    """Triton 3.6.0, set up beside the environment by `make test`: the 16-bit kernels of one NVIDIA and one AMD GPU."""
    old = Path(sys.prefix) / "triton-3.6.0"
    if not old.exists():
        pytest.skip("Triton 3.6.0 is not set up beside the environment; make test does it")
    variables = {**COMPILER, "PYTHONPATH": f"{old}{os.pathsep}{ROOT}"}
    printed = check(variables, "--check", "--architectures", "sm_90", "gfx942", "--dtypes", "fp16")
    assert "Triton 3.6.0" in printed


@pytest.mark.parametrize("version", RECORDED)
def test_the_recorded_reports_hold_every_shipped_configuration_of_these_sources(version):
    recorded = read(version)
    stale = static_jobs.changed(static_jobs.jobs(), recorded)
    assert not stale, f"{len(stale)} rows are stale; `make static-report` compiles them anew"
    assert len(recorded) == len(list(static_jobs.jobs()))


@pytest.mark.parametrize("version", RECORDED)
def test_the_recorded_reports_hold_matrix_instructions_and_no_spill(version):
    for record in read(version):
        assert record["spilled_bytes"] == 0, record
        assert record["programs_per_multiprocessor"] >= 1, record
        if record["name"] in static_jobs.ATTENTION and record["dtype"] != "fp32":
            expected = {"sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}.get(record["architecture"])
            assert expected is None or expected in record["matrix_instructions"], record
            assert record["matrix_instructions"], record


def test_the_representative_rows_are_one_per_kernel_dtype_and_target():
    rows = static_jobs.representative(static_jobs.jobs())
    counts = Counter((job.name, job.dtype, job.architecture) for job in rows)
    for target in ("sm_80", "sm_90", "gfx942"):
        for name in static_jobs.KERNELS:
            for dtype in ("fp32",) if name in ("select", "class_lines") else ("fp16", "bf16", "fp32"):
                launches = 2 if (name, dtype) == ("key_gradient", "fp32") else 1
                assert counts.pop((name, dtype, target)) == launches
    assert not counts
    assert {len(tiles_triton.block_widths(job.head_dim)) for job in rows if job.name == "forward"} == {1, 2}


@pytest.mark.parametrize("field", ["source", "options", "constants"])
def test_a_row_has_changed_where_its_source_or_configuration_is_not_as_recorded(field):
    jobs = list(static_jobs.jobs())[:20]
    recorded = [json.loads(json.dumps(job.to_dict())) for job in jobs]
    assert static_jobs.changed(jobs, recorded) == []
    recorded[7][field] = "another"
    assert static_jobs.changed(jobs, recorded) == [jobs[7]]


def test_an_update_keeps_what_is_still_shipped_in_the_order_of_the_jobs():
    jobs = list(static_jobs.jobs())[:20]
    shipped = [json.loads(json.dumps(job.to_dict())) for job in jobs]
    records = [*reversed(shipped), {**shipped[3], "source": "another"}]
    assert static_jobs.of_jobs(jobs, records) == shipped
    with pytest.raises(KeyError):
        static_jobs.of_jobs(jobs, shipped[1:])


@pytest.fixture
def fresh_hashes():
    static_jobs.source_hash.cache_clear()
    yield
    static_jobs.source_hash.cache_clear()


def other_outer(p, row):
    return [block[None, :] * p[:, None] for block in row]


@pytest.mark.usefixtures("fresh_hashes")
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (tiles_triton, "FP32_COLUMNS", tl.constexpr(8)),
        (maws_attention_triton, "outer", triton.jit(other_outer)),
    ],
    ids=["constant", "device function"],
)
def test_the_hash_follows_what_the_kernel_uses_and_nothing_else(monkeypatch, module, name, value):
    before = {kernel: static_jobs.source_hash(kernel) for kernel in ("forward", "gather")}
    static_jobs.source_hash.cache_clear()
    monkeypatch.setattr(module, name, value)
    assert static_jobs.source_hash("forward") != before["forward"]
    assert static_jobs.source_hash("gather") == before["gather"]


KERNEL = 'def kernel(x):\n    """What it does."""\n    return x + 1  # why\n'


@pytest.mark.usefixtures("fresh_hashes")
@pytest.mark.parametrize(
    ("source", "same"),
    [
        (KERNEL, True),
        (f"import math\n\n\n{KERNEL}", True),
        (KERNEL.replace("What it does", "Something else").replace("# why", "# because"), True),
        (KERNEL.replace("x + 1", "x + 2"), False),
    ],
    ids=["equal", "moved", "comments", "code"],
)
def test_the_hash_is_of_code_not_of_comments_docstrings_or_place(monkeypatch, tmp_path, source, same):
    hashes = []
    for folder, text in (("a", KERNEL), ("b", source)):
        path = tmp_path / folder / "kernels.py"
        path.parent.mkdir()
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("kernels", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(static_jobs.KERNELS, "gather", SimpleNamespace(fn=module.kernel))
        static_jobs.source_hash.cache_clear()
        hashes.append(static_jobs.source_hash("gather"))
    assert (hashes[0] == hashes[1]) is same


def test_a_tensor_is_its_pointer_and_its_strides_to_the_compiler():
    job = static_jobs.Job("key_gradient", "sm_90", "fp16", 64, (("D", 64), ("dv", None)), ())
    signature, constants, attributes = static_jobs.compiler_arguments(job)
    assert signature["q"] == ("*fp16", ("i32", "i32", "i32"))
    assert (signature["N"], signature["scale"], signature["lse_ptr"]) == ("i32", "fp32", "*fp32")
    assert signature["dv"] == signature["D"] == "constexpr"
    names = static_jobs.KERNELS["key_gradient"].arg_names
    assert constants == {(names.index("D"),): 64, (names.index("dv"),): None}
    first = names.index("q")
    assert {(first, 0), (first, 1, 0), (first, 1, 1), (first, 1, 2)} <= set(attributes)
    assert not {(names.index(name),) for name in ("N", "H", "scale")} & set(attributes)


def test_a_stride_of_one_is_compiled_in():
    job = static_jobs.Job("gather", "sm_90", "bf16", 0, (("COLUMNS", 1024),), ())
    signature, constants, _ = static_jobs.compiler_arguments(job)
    assert signature["x"] == ("*bf16", ("i32", "i32", "constexpr"))
    assert (constants[(0, 1, 2)], constants[(1, 1, 1)]) == (1, 1)
