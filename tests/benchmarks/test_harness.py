"""The benchmarks: the rival in the authors' form, the harness, the model benchmark end to end, the report."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ffvt
from benchmarks import accuracy, bench_maws_attention, bench_model, bench_selection, report
from benchmarks.authors_eager import AuthorsEagerFFVT
from benchmarks.harness import (
    Case,
    DisagreementError,
    Timing,
    append_results,
    environment,
    measure,
    peak_memory,
    require_close,
    require_equal,
    speedups,
)

MIB = 1024**2
RIVALS = (*bench_model.FUSION, *bench_model.PLAIN)
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_fusion.npz"
TINY = ffvt.FFVTConfig(
    image_size=64, num_classes=5, embed_dim=64, depth=4, num_heads=4, mlp_dim=128, num_select=3, dropout=0.0
)
MARKERS = "# ffvt\n\n<!-- bench:model -->\nold\n<!-- /bench:model -->\n\nend\n"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "fi"}


def part(golden: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


@pytest.fixture
def eager(golden: dict[str, torch.Tensor]) -> AuthorsEagerFFVT:
    model = AuthorsEagerFFVT(TINY)
    model.load_state_dict(part(golden, "w/"), strict=True)
    return model


def test_authors_form_reproduces_the_authors_logits_and_picks(
    golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT
) -> None:
    logits, index = eager.forward_with_index(golden["x"])
    assert torch.equal(index, golden["indices"])
    require_close("logits", logits, golden["logits"], 1e-5)


def test_authors_form_reproduces_every_gradient_of_the_authors_loss(
    golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT
) -> None:
    loss = F.cross_entropy(eager(golden["x"]), golden["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in eager.named_parameters()}
    expected = part(golden, "g/")
    assert gradients.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():  # a key's bias has no gradient but rounding: compared to the largest of all
        assert (gradients[name] - value).abs().max().item() <= 1e-5 * max(value.abs().max().item(), 1e-2 * largest), (
            name
        )


def test_authors_form_keeps_a_full_map_per_block(golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT) -> None:
    _, maps, _ = eager.transformer(golden["x"])
    fused = 1 + (TINY.depth - 1) * TINY.num_select
    assert [tuple(m.shape) for m in maps] == [(2, 4, 17, 17)] * 3 + [(2, 4, fused, fused)]
    for probs in maps:
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


@pytest.mark.parametrize("change", [{"feature_fusion": False}, {"layer_scale": 1e-5}, {"first_candidate": 1}])
def test_authors_form_refuses_what_the_authors_model_lacks(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="authors' fusion model"):
        AuthorsEagerFFVT(dataclasses.replace(TINY, **change))


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


def allocate(held: torch.Tensor, mib: int) -> None:
    scratch = torch.ones(mib * MIB, dtype=torch.uint8)
    del scratch
    assert held.numel() > 0


def setup_allocation(held_mib: int, mib: int) -> Callable[[], None]:
    return partial(allocate, torch.ones(held_mib * MIB, dtype=torch.uint8), mib)


def test_peak_memory_counts_what_a_call_allocates_and_not_what_is_held() -> None:
    """Large, then small, then one held block: neither an earlier case nor the set-up shows in the numbers."""
    cases = [Case("large", partial(setup_allocation, 1, 96)), Case("held", partial(setup_allocation, 64, 32))]
    peaks = peak_memory(cases, "cpu")
    if None in peaks:
        pytest.skip("resident memory cannot be measured on this system")
    assert peaks[0] == pytest.approx(96 * MIB, abs=4 * MIB)
    assert peaks[1] == pytest.approx(32 * MIB, abs=4 * MIB)


def test_the_environment_names_device_flags_versions_and_threads() -> None:
    found = environment()
    assert found["device"] == "cpu"
    assert torch.__version__.startswith(found["torch"])
    assert (found["ffvt"], found["threads"]) == (ffvt.__version__, torch.get_num_threads())
    assert all(flag.startswith(("amx", "avx", "fma", "f16c")) for flag in found["cpu_flags"])
    json.dumps(found)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `bench_model --quick`, without the pass for memory, which costs a second process."""
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("results") / "model.jsonl"
    threads = str(torch.get_num_threads())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_model, "peak_memory", lambda cases, device: [len(pickle.dumps(case)) for case in cases])
        bench_model.main(["--quick", "--rounds", "2", "--batch_size", "2", "--threads", threads, "--out", str(out)])
    append_results(
        out.with_name("other.jsonl"), [{"benchmark": "other", "count": 5}]
    )  # no times, no accuracies: passed over
    return out


def test_the_model_benchmark_writes_a_line_per_rival_and_mode(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    expected = [(mode, name) for mode in ("forward", "step") for name in RIVALS]
    assert [(record["mode"], record["case"]) for record in records] == expected
    for record in records:
        assert record["time_ms"]["n"] == 2
        assert record["speedup"].keys() == {bench_model.EAGER, bench_model.TIMM}
        assert record["parameters"]["model_type"] == "tiny"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rival", RIVALS)
def test_a_training_step_changes_every_weight_that_learns_and_drops_the_gradients(rival: str, dtype: str) -> None:
    pytest.importorskip("timm")
    step = bench_model.Workload(rival, "step", TINY, 2, dtype, "cpu")()
    model = step.args[0]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) >= 0.9 * len(before)  # a key's bias has no gradient but rounding


def test_the_gate_holds_for_all_rivals_and_fails_for_a_rival_with_another_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    bench_model.check_agreement(TINY, "cpu")
    build = bench_model.build_rival

    def build_wrong(name: str, config: ffvt.FFVTConfig) -> torch.nn.Module:
        model = build(name, config)
        if name == bench_model.OURS:
            model.blocks[0].attn.qkv.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(bench_model, "build_rival", build_wrong)
    with pytest.raises(DisagreementError, match="ours and authors' eager"):
        bench_model.check_agreement(TINY, "cpu")


def test_timm_drops_out_where_ours_does() -> None:
    """The same seed gives the same masks in the same order once ours computes every row of its last block."""
    pytest.importorskip("timm")
    config = dataclasses.replace(TINY, dropout=0.1, prune_dead_rows=False)
    timm_vit = bench_model.build_rival(bench_model.TIMM, config)
    ours = bench_model.build_rival(bench_model.OURS_PLAIN, config)
    images, _ = bench_model.random_batch(config, 2, "cpu")
    logits = []
    for model in (timm_vit, ours):
        torch.manual_seed(3)
        logits.append(model.train()(images))
    require_close("logits", logits[1], logits[0], 1e-5)
    with pytest.raises(DisagreementError):
        require_close("logits", timm_vit.eval()(images), logits[0], 1e-5)


def write_readme(folder: Path, text: str = MARKERS) -> Path:
    readme = folder / "README.md"
    readme.write_text(text)
    return readme


def run_report(readme: Path, results: Path, *flags: str) -> int:
    return report.main(["--readme", str(readme), "--results", str(results), *flags])


def test_the_report_fills_the_markers_and_then_checks_clean(quick: Path, tmp_path: Path) -> None:
    readme = write_readme(tmp_path)
    assert run_report(readme, quick.parent, "--check") == 1
    assert readme.read_text() == MARKERS
    assert run_report(readme, quick.parent) == 0
    text = readme.read_text()
    assert text.startswith("# ffvt\n\n<!-- bench:model -->\n**")
    assert text.endswith("<!-- /bench:model -->\n\nend\n")
    assert "old" not in text
    assert all(f"\n| {rival} |" in text for rival in RIVALS)
    assert ("AMX (" in text) != ("no AMX" in text)
    assert f"torch {environment()['torch']}" in text
    assert f"commit {environment()['commit']}" in text
    assert run_report(readme, quick.parent, "--check") == 0


def test_the_latest_line_of_a_rival_wins_and_other_parameters_get_a_table_of_their_own(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    newer = json.loads(json.dumps(records[0]))
    newer["time_ms"].update(median=4321.0, p20=4000.0, p80=5000.0)
    text = report.render([*records, newer])
    assert text.count("| rival |") == 1
    assert "| authors' eager | 4321 [4000-5000] |" in text
    newer["parameters"]["batch_size"] = 64
    assert report.render([*records, newer]).count("| rival |") == 2


def test_the_report_says_what_is_missing(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    readme = write_readme(tmp_path)
    assert run_report(readme, empty) == 1
    assert "no results" in capsys.readouterr().err
    assert run_report(tmp_path / "none.md", quick.parent) == 1
    assert "there is no none.md" in capsys.readouterr().err
    assert run_report(write_readme(tmp_path, "# nothing\n"), quick.parent) == 1
    assert "<!-- bench:model -->" in capsys.readouterr().err
    (empty / "model.jsonl").write_text("{broken\n")
    assert run_report(readme, empty, "--check") == 1
    assert "model.jsonl:1 is not JSON" in capsys.readouterr().err


def test_the_table_of_accuracies_has_a_column_per_seed_and_says_what_was_not_run():
    shared = {"benchmark": "finetune", "environment": environment(), "parameters": "tiny", "images": 9}
    shared["train_images_per_second"] = 1.0
    runs = [("fused", 0, 0.5), ("plain", 0, 0.25), ("fused", 1, 0.1), ("fused", 1, 0.7)]
    table = report.render_accuracies([{**shared, "variant": v, "seed": s, "top1": a} for v, s, a in runs]).splitlines()
    assert table[2] == "| variant | seed 0 | seed 1 | mean |"
    assert table[4] == "| fused | 0.500 | 0.700 | 0.600 |"
    assert table[5] == "| plain | 0.250 | not run | 0.250 |"


def test_error_ratios_are_measured_against_the_bar_and_rendered():
    found = accuracy.compare((1, 17, 2, 32), "fp32", "torch", "cpu")
    assert accuracy.passes(found)
    assert set(found["ratios"]) == {"out", "dq", "dk", "dv"}
    for worse in ({"ratios": {**found["ratios"], "out": 2.1}}, {"ratios": {**found["ratios"], "dk": 3.1}}):
        assert not accuracy.passes({**found, **worse})
    assert not accuracy.passes({**found, "picks_equal": False})
    environment = {"device": "cpu", "torch": "2", "triton": "3", "commit": "abc"}
    record = {"benchmark": "accuracy", "environment": environment, "shape": [1, 17, 2, 32], "dtype": "fp32", **found}
    other = {**record, "backend": "cpp", "environment": {**environment, "device_name": "a CPU"}}
    text = report.render_error_ratios([{**record, "backend": "triton"}, other])
    assert text.splitlines()[-1].startswith("| 1, 17, 2, 32 | fp32 | ")
    assert text.count("Triton's interpreter") == text.count("The cpp backend on a CPU") == 1


def test_the_attention_benchmark_writes_every_mode_and_rival_and_its_gate_can_fail(tmp_path, monkeypatch):
    out = tmp_path / "maws_attention.jsonl"
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--rounds", "2", "--threads", threads, "--out", str(out), "--dtypes", "fp32", "bf16"]
    bench_maws_attention.main(arguments)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    rivals = [name for name in bench_maws_attention.RIVALS if name != report.COMPILED]
    modes = bench_maws_attention.MODES
    assert [(r["dtype"], r["mode"], r["case"]) for r in records] == [
        (dtype, mode, name) for dtype in ("fp32", "bf16") for mode in modes for name in rivals
    ]
    assert all(record["gflops"] > 0 and record["matmul_gflops"] > 0 for record in records)
    rows = report.render_attention(records).splitlines()[-2:]
    assert rows[0].startswith("| fp32 | 1, 37, 16 | ")
    assert rows[1].startswith("| bf16 | 1, 37, 16 | ")
    monkeypatch.setitem(bench_maws_attention.RIVALS, "SDPA alone", lambda qkv, k: (1.01 * qkv[:, :, 2], None))
    with pytest.raises(DisagreementError, match="out of SDPA alone"):
        bench_maws_attention.main(arguments)


def test_the_selection_benchmark_writes_every_operator_and_rival(tmp_path):
    out = tmp_path / "selection.jsonl"
    sizes = ["--tokens", "37", "--heads", "2", "--head_dim", "16", "--rounds", "1", "--dtypes", "fp32"]
    bench_selection.main([*sizes, "--threads", str(torch.get_num_threads()), "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    operators = ("maws_select", "gather_tokens", "its gradient")
    assert [(r["mode"], r["case"]) for r in records] == [(o, c) for o in operators for c in bench_selection.BACKENDS]


def test_what_is_not_timed_runs_before_every_sample():
    calls = []
    measure([Case("a", lambda: lambda: calls.append("a"))], 2, 1, "cpu", calls=2, before=lambda: calls.append("before"))
    assert calls == ["before", "a", "a"] * 3


def test_the_readme_shows_the_recorded_results():
    assert report.main(["--check"]) == 0
