"""Tables of what came out: every kind of record has its columns, and what runs on two CPUs gave is kept apart."""

from __future__ import annotations

from benchmarks import accuracy, outcome_tables
from benchmarks.harness import environment

CPU = {"device": "cpu", "cpu_name": "a CPU", "cpu_flags": [], "cpu_capability": "AVX2", "torch": "2", "triton": "3"}
HERE, THERE = ({**CPU, "cpu_name": name, "commit": "abc"} for name in ("here", "there"))


def test_the_table_of_accuracies_has_a_column_per_seed_and_says_what_was_not_run():
    shared = {"benchmark": "finetune", "environment": environment(), "parameters": "tiny", "images": 9}
    shared["train_images_per_second"] = 1.0
    runs = [("fused", 0, 0.5), ("plain", 0, 0.25), ("fused", 1, 0.1), ("fused", 1, 0.7)]
    table = outcome_tables.render_accuracies(
        [{**shared, "variant": v, "seed": s, "top1": a} for v, s, a in runs]
    ).splitlines()
    assert table[2] == "| variant | seed 0 | seed 1 | mean |"
    assert table[4] == "| fused | 0.500 | 0.700 | 0.600 |"
    assert table[5] == "| plain | 0.250 | not run | 0.250 |"


def test_error_ratios_have_a_table_per_backend_and_device():
    found = accuracy.compare((1, 17, 2, 32), "fp32", "torch", "cpu")
    record = {"benchmark": "accuracy", "environment": HERE, "shape": [1, 17, 2, 32], "dtype": "fp32", **found}
    cpp, there = {**record, "backend": "cpp"}, {**record, "backend": "cpp", "environment": THERE}
    text = outcome_tables.render_error_ratios([{**record, "backend": "triton"}, cpp, there])
    assert text.splitlines()[-1].startswith("| 1, 17, 2, 32 | fp32 | ")
    captions = [line.partition(", torch")[0] for line in text.splitlines() if line.startswith("**")]
    assert captions == [
        "**Triton's interpreter on here (AVX2, no AMX)",
        "**The cpp backend on here (AVX2, no AMX)",
        "**The cpp backend on there (AVX2, no AMX)",
    ]


def test_a_run_on_another_cpu_neither_replaces_an_accuracy_nor_a_count():
    run = {"parameters": "tiny", "images": 9, "train_images_per_second": 1.0, "variant": "fused", "seed": 0}
    text = outcome_tables.render_accuracies(
        [{**run, "environment": HERE, "top1": 0.5}, {**run, "environment": THERE, "top1": 0.25}]
    )
    assert text.count("| fused | 0.500 | 0.500 |") == text.count("| fused | 0.250 | 0.250 |") == 1
    case = {"fault": "killed", "tried": 2}
    text = outcome_tables.render_counts(
        [{**case, "environment": HERE, "passed": 1}, {**case, "environment": THERE, "passed": 2}]
    )
    assert text.count("| killed | 1/2 | abc |") == text.count("| killed | 2/2 | abc |") == 1


def test_runs_of_a_criterion_on_two_cpus_all_count():
    run = {"parameters": "tiny", "criterion": "maws", "seed": 0, "hit_rate": None}
    again = {**run, "environment": THERE}
    text = outcome_tables.render_criteria(
        [{**run, "environment": HERE, "accuracy": 0.5}, {**again, "accuracy": 0.1}, {**again, "accuracy": 0.7}]
    )
    assert "here (AVX2, no AMX), there (AVX2, no AMX)" in text
    assert text.splitlines()[-1] == "| maws | 0.600 | 0.141 | 0.500 to 0.700 | - | 2 |"
