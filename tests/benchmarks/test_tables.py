"""Tables: the latest line wins, and every kind of record has its columns."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import accuracy, tables
from benchmarks.harness import environment


def test_the_latest_line_of_a_rival_wins_and_other_parameters_get_a_table_of_their_own(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    newer = json.loads(json.dumps(records[0]))
    newer["time_ms"].update(median=4321.0, p20=4000.0, p80=5000.0)
    text = tables.render([*records, newer])
    assert text.count("| rival |") == 1
    assert "| authors' eager | 4321 [4000-5000] |" in text
    newer["parameters"]["batch_size"] = 64
    assert tables.render([*records, newer]).count("| rival |") == 2


def test_the_table_of_accuracies_has_a_column_per_seed_and_says_what_was_not_run():
    shared = {"benchmark": "finetune", "environment": environment(), "parameters": "tiny", "images": 9}
    shared["train_images_per_second"] = 1.0
    runs = [("fused", 0, 0.5), ("plain", 0, 0.25), ("fused", 1, 0.1), ("fused", 1, 0.7)]
    table = tables.render_accuracies([{**shared, "variant": v, "seed": s, "top1": a} for v, s, a in runs]).splitlines()
    assert table[2] == "| variant | seed 0 | seed 1 | mean |"
    assert table[4] == "| fused | 0.500 | 0.700 | 0.600 |"
    assert table[5] == "| plain | 0.250 | not run | 0.250 |"


def test_error_ratios_have_a_table_per_backend_and_device():
    found = accuracy.compare((1, 17, 2, 32), "fp32", "torch", "cpu")
    environment = {"device": "cpu", "torch": "2", "triton": "3", "commit": "abc"}
    record = {"benchmark": "accuracy", "environment": environment, "shape": [1, 17, 2, 32], "dtype": "fp32", **found}
    other = {**record, "backend": "cpp", "environment": {**environment, "device_name": "a CPU"}}
    text = tables.render_error_ratios([{**record, "backend": "triton"}, other])
    assert text.splitlines()[-1].startswith("| 1, 17, 2, 32 | fp32 | ")
    assert text.count("Triton's interpreter") == text.count("The cpp backend on a CPU") == 1


def test_a_graph_is_a_column_and_a_row_of_its_own(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    graphs = [{**record, "launch": "graph", "l2": "hot"} for record in records]
    header = tables.render([*records, *graphs]).splitlines()[2]
    assert header.startswith("| rival | forward, ms | step, ms | forward, hot graph, ms | step, hot graph, ms |")
