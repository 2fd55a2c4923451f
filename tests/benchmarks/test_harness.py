"""The harness: interleaved rounds, the gate, the environment, where records go."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import torch

import ffvt
from benchmarks import harness
from benchmarks.harness import (
    Case,
    DisagreementError,
    Timing,
    environment,
    make_parser,
    measure,
    require_close,
    require_equal,
    save,
    speedups,
    stamp,
)


def recording_case(name: str, calls: list[str]) -> Case:
    return Case(name, lambda: lambda: calls.append(name))


def test_every_round_runs_every_case_once_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    timings = measure([recording_case(name, calls) for name in "abc"], rounds=5, warmup=2, device="cpu")
    rounds = [sorted(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert rounds == [["a", "b", "c"]] * 7
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 5, "b": 5, "c": 5}


def test_a_gate_that_raises_stops_before_any_case_is_set_up() -> None:
    gate, setup = Mock(side_effect=DisagreementError), Mock()
    with pytest.raises(DisagreementError):
        measure([Case("a", setup)], rounds=1, warmup=0, device="cpu", gate=gate)
    setup.assert_not_called()


def test_a_timing_is_summarised_by_median_and_percentiles() -> None:
    summary = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0)).to_dict()
    assert (summary["median"], summary["p20"], summary["p80"], summary["n"]) == (3.5, 2.0, 5.0, 6)


def test_speed_up_is_given_by_medians_and_paired_within_rounds() -> None:
    timings = {"base": Timing((10.0, 20.0, 90.0)), "case": Timing((5.0, 40.0, 30.0))}
    assert speedups(timings, "base")["case"] == {"medians": round(20 / 30, 4), "paired": 2.0}
    assert speedups(timings, "base")["base"] == {"medians": 1.0, "paired": 1.0}


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])),
        (torch.tensor([torch.nan, 2.0]), torch.tensor([1.0, 2.0])),
        (torch.zeros(2), torch.zeros(2)),
        (torch.ones(2), torch.ones(2, 1)),
    ],
    ids=["apart", "nan", "all zero", "shapes"],
)
def test_the_gate_refuses_what_does_not_agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    with pytest.raises(DisagreementError):
        require_close("x", actual, expected, 1e-2)


def test_the_gate_refuses_other_picks() -> None:
    require_equal("index", torch.tensor([3, 1]), torch.tensor([3, 1]))
    with pytest.raises(DisagreementError):
        require_equal("index", torch.tensor([3, 1]), torch.tensor([1, 3]))


def test_what_is_not_timed_runs_before_every_sample():
    calls = []
    measure([Case("a", lambda: lambda: calls.append("a"))], 2, 1, "cpu", calls=2, before=lambda: calls.append("before"))
    assert calls == ["before", "a", "a"] * 3


def test_the_environment_names_device_flags_versions_and_threads() -> None:
    found = environment()
    assert found["device"] == "cpu"
    assert torch.__version__.startswith(found["torch"])
    assert (found["ffvt"], found["threads"]) == (ffvt.__version__, torch.get_num_threads())
    assert all(flag.startswith(("amx", "avx", "fma", "f16c")) for flag in found["cpu_flags"])
    json.dumps(found)


def test_a_stamp_names_the_benchmark_and_the_machine() -> None:
    found = stamp("selection", "cpu")
    assert found["benchmark"] == "selection"
    assert found["environment"]["torch"] == environment()["torch"]
    assert found["date"][:2] == "20"


def test_a_quick_run_writes_only_where_it_is_asked_to(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    parser = make_parser(None, rounds=5, warmup=1)
    save([{"a": 1}], parser.parse_args(["--quick"]), "x.jsonl")
    assert not (tmp_path / "results").exists()
    save([{"a": 1}], parser.parse_args(["--quick", "--out", str(tmp_path / "mine.jsonl")]), "x.jsonl")
    assert json.loads((tmp_path / "mine.jsonl").read_text()) == {"a": 1}
    for _ in range(2):
        save([{"a": 2}], parser.parse_args([]), "x.jsonl")
    assert (tmp_path / "results" / "x.jsonl").read_text().splitlines() == ['{"a": 2}'] * 2


def test_results_are_appended_and_what_a_file_holds_stays(tmp_path) -> None:
    out = tmp_path / "results" / "x.jsonl"
    parser = make_parser(None, rounds=5, warmup=1)
    before = b""
    for name in ("here", "there", "here"):
        save([{"cpu": name}, {"cpu": name}], parser.parse_args(["--out", str(out)]), "x.jsonl")
        after = out.read_bytes()
        assert after.startswith(before)
        assert after[len(before) :] == 2 * f'{{"cpu": "{name}"}}\n'.encode()
        before = after
