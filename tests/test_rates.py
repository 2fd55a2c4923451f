"""The rates of matrix products, and the precision that they favour."""

import subprocess
import sys
import time

import pytest
import torch

from ffvt import rates
from ffvt.precision import PRECISIONS, TORCH_NAMES
from ffvt.rates import FEW_ROWS, ROUNDS, ROWS, SIDE, fastest_precision, matmul_rates, rates_line, rates_text


@pytest.fixture(autouse=True)
def _nothing_measured_before():
    rates._measured.cache_clear()
    yield
    rates._measured.cache_clear()


@pytest.fixture
def products(monkeypatch):
    """What is multiplied, as (dtype, rows): in seconds for every row, by dtype; RuntimeError where it has none."""
    seen = []

    def measured(seconds):
        def of_product(matrix, rows):
            seen.append((matrix.dtype, rows))
            if matrix.dtype not in seconds:
                raise RuntimeError("not implemented")
            return rows * seconds[matrix.dtype]

        monkeypatch.setattr(rates, "_seconds", of_product)
        monkeypatch.setattr(rates, "SECONDS", 0.0)
        return seen

    return measured


def test_rates_are_plausible_quick_and_leave_random_numbers_alone():
    before, started = torch.get_rng_state(), time.perf_counter()
    found = matmul_rates("cpu")
    assert time.perf_counter() - started < 5  # 0.1 s where nothing else runs
    assert tuple(found) == PRECISIONS
    assert all(1e7 < rate < 1e15 for rate in found.values())
    assert torch.equal(before, torch.get_rng_state())


def test_rates_are_measured_once_for_a_number_of_threads_and_a_permission_for_tf32(products, one_thread):
    seen = products(dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e-3))
    found = matmul_rates("cpu")
    once = len(seen)
    found["fp32"] = 0.0  # the caller's own
    assert matmul_rates(torch.device("cpu"))["fp32"] == pytest.approx(2 * SIDE**2 / 1e-3)
    assert len(seen) == once
    torch.set_num_threads(2)
    matmul_rates("cpu")
    assert len(seen) == 2 * once
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    matmul_rates("cpu")
    torch.set_float32_matmul_precision(before)
    assert len(seen) == 3 * once


def test_a_hopeless_precision_is_rated_by_its_small_products_alone(products):
    seen = products({torch.float32: 1e-3, torch.bfloat16: 2e-3, torch.float16: 5e-2})
    found = matmul_rates("cpu")
    assert [found[name] for name in PRECISIONS] == pytest.approx([2 * SIDE**2 / s for s in (1e-3, 2e-3, 5e-2)])
    assert [rows for dtype, rows in seen if dtype == torch.float16] == [FEW_ROWS] * ROUNDS
    large = [dtype for dtype, rows in seen if rows == ROWS]
    assert large == [torch.float32, torch.bfloat16] * ROUNDS  # they take turns


def test_a_precision_that_the_device_cannot_multiply_is_left_out_but_not_fp32(products):
    products({torch.float32: 1e-3, torch.float16: 1e-3})
    assert tuple(matmul_rates("cpu")) == ("fp32", "fp16")
    rates._measured.cache_clear()
    products({torch.float16: 1e-3})
    with pytest.raises(RuntimeError, match="not implemented"):
        matmul_rates("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rates_of_a_gpu_are_plausible():
    found = matmul_rates("cuda")
    assert found["fp32"] > 1e11
    assert max(found.values()) < 1e16


@pytest.mark.parametrize(
    ("device", "fp32", "bf16", "fp16", "fastest"),
    [
        ("cpu", 161, 84, 158, "fp32"),  # an Intel CPU whose virtual machine hides AMX
        ("cpu", 105, 220, 2, "bf16"),  # AMD Zen 4
        ("cpu", 160, 1280, 600, "bf16"),  # AMX
        ("cpu", 100, 119, 100, "fp32"),
        ("cpu", 100, 120, 100, "bf16"),
        ("cpu", 100, 90, 900, "fp32"),  # never fp16 on a CPU
        ("cpu", 100, 130, 900, "bf16"),
        ("cpu", 100, None, 900, "fp32"),
        ("cuda", 50, 760, 798, "bf16"),  # a tie
        ("cuda", 50, 760, 799, "fp16"),
        ("cuda", 8, 4, 60, "fp16"),  # a GPU without bf16
        ("cuda", 8, None, 60, "fp16"),
        ("cuda", 100, 110, 119, "fp32"),
        ("cuda", 100, 110, 120, "fp16"),
        ("cuda", 50, None, None, "fp32"),
    ],
)
def test_the_fastest_precision_by_the_rules(device, fp32, bf16, fp16, fastest):
    given = {"fp32": fp32, "bf16": bf16, "fp16": fp16}
    assert fastest_precision({name: rate for name, rate in given.items() if rate}, device) == fastest


def test_a_sharded_model_never_gets_fp16():
    assert fastest_precision({"fp32": 8, "bf16": 20, "fp16": 60}, "cuda", fsdp=True) == "bf16"
    assert fastest_precision({"fp32": 8, "bf16": 4, "fp16": 60}, "cuda", fsdp=True) == "fp32"


def test_rates_are_told_in_units_that_people_read():
    assert rates_text({"fp32": 160.4e9, "bf16": 1284e9, "fp16": 2.14e9}) == "fp32 160, bf16 1,284, fp16 2.1 GFLOP/s"
    assert rates_text({"fp32": 51e12, "bf16": 760e12}) == "fp32 51, bf16 760 TFLOP/s"
    told = rates_line({"fp32": 160e9, "bf16": 84e9, "fp16": 158e9}, "cpu", fsdp=False)
    assert told == "products: fp32 160, bf16 84, fp16 158 GFLOP/s; fp32 trains fastest here"


def test_the_module_imports_no_torch():
    code = "import sys, ffvt.rates; assert not 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_precision_is_measured_in_its_dtype(products):
    dtypes = {getattr(torch, name) for name in TORCH_NAMES.values()}
    seen = products(dict.fromkeys(dtypes, 1e-3))
    matmul_rates("cpu")
    assert {dtype for dtype, _ in seen} == dtypes
