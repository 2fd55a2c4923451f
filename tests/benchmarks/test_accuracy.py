"""Error ratios are measured, and the bar can be missed."""

import json

import pytest
import torch

from benchmarks import accuracy
from tests.helpers import explicit, rms, truth


def test_error_ratios_are_measured_against_the_bar():
    found = accuracy.compare((1, 17, 2, 32), "fp32", "torch", "cpu")
    assert accuracy.passes(found)
    assert set(found["ratios"]) == {"out", "dq", "dk", "dv"}
    for worse in ({"ratios": {**found["ratios"], "out": 2.1}}, {"ratios": {**found["ratios"], "dk": 3.1}}):
        assert not accuracy.passes({**found, **worse})
    assert not accuracy.passes({**found, "picks_equal": False})


def test_the_truth_is_the_explicit_form_in_fp64():
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    out, score = truth(q, k, v, 0.5)
    assert rms(explicit(q, k, v, 0.5), out) < 1e-15
    assert rms(out + 3, out) == pytest.approx(3)
    assert score.shape == (1, 9)


def test_a_missed_bar_is_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPES", ((1, 17, 2, 32),))
    arguments = ["--backend", "torch", "--device", "cpu", "--dtypes", "fp32", "--out", str(tmp_path / "a.jsonl")]
    assert accuracy.main(arguments) == 0
    monkeypatch.setitem(accuracy.BARS, "dk", 0.0)
    assert accuracy.main(arguments) == 1
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(r["benchmark"], r["backend"], r["dtype"]) for r in records] == [("accuracy", "torch", "fp32")] * 2
