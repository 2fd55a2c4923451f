"""What a device does at best is measured once a process."""

from unittest.mock import Mock

import pytest

from benchmarks import ceilings
from benchmarks.harness import Timing


@pytest.fixture(autouse=True)
def _nothing_measured_before():
    for function in (ceilings.matmul_peak, ceilings.copy_peak):
        function.cache_clear()
    yield
    for function in (ceilings.matmul_peak, ceilings.copy_peak):
        function.cache_clear()


def test_the_peak_is_that_of_the_best_sample_of_the_best_size(monkeypatch):
    timings = {"100": Timing((2.0, 1.0, 3.0)), "200": Timing((4.0, 9.0))}
    measure = Mock(return_value=timings)
    monkeypatch.setattr(ceilings, "measure", measure)
    assert ceilings.matmul_peak("bf16", "cpu", (100, 200)) == pytest.approx(2 * 200**3 / 4e6)
    ceilings.matmul_peak("bf16", "cpu", (100, 200))
    assert measure.call_count == 1


def test_fp16_on_a_cpu_is_measured_in_fp32(monkeypatch):
    seen = []

    def measure(cases, *_):
        seen.extend(case.setup().args[0].dtype for case in cases)
        return {"8": Timing((1.0,))}

    monkeypatch.setattr(ceilings, "measure", measure)
    for dtype in ("fp16", "bf16"):
        ceilings.matmul_peak(dtype, "cpu", (8,))
    assert [str(dtype) for dtype in seen] == ["torch.float32", "torch.bfloat16"]


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda cases, *_: {"copy": Timing((2.0, 0.5))})
    assert ceilings.copy_peak("cpu", 1000) == pytest.approx(2 * 4000 / 0.5 / 1e6)
    monkeypatch.undo()
    ceilings.copy_peak.cache_clear()
    assert ceilings.copy_peak("cpu", 1000) > 0
