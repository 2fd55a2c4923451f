"""Tables of times: the latest line wins, and a graph has columns of its own."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import timing_tables


def test_the_latest_line_of_a_rival_wins_and_other_parameters_get_a_table_of_their_own(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    newer = json.loads(json.dumps(records[0]))
    newer["time_ms"].update(median=4321.0, p20=4000.0, p80=5000.0)
    text = timing_tables.render([*records, newer])
    assert text.count("| rival |") == 1
    assert "| authors' eager | 4321 [4000-5000] |" in text
    newer["parameters"]["batch_size"] = 64
    assert timing_tables.render([*records, newer]).count("| rival |") == 2


def test_a_graph_is_a_column_and_a_row_of_its_own(quick: Path) -> None:
    records = [json.loads(line) for line in quick.read_text().splitlines()]
    graphs = [{**record, "launch": "graph", "l2": "hot"} for record in records]
    header = timing_tables.render([*records, *graphs]).splitlines()[2]
    assert header.startswith("| rival | forward, ms | step, ms | forward, hot graph, ms | step, hot graph, ms |")
