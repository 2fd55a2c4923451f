"""The report fills the pages' markers, and the pages show the recorded results."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.devices import cpu_and_threads
from benchmarks.harness import RESULTS, environment
from benchmarks.model_rivals import FUSION, PLAIN

RIVALS = (*FUSION, *PLAIN)
MARKERS = "# ffvt\n\n<!-- bench:model -->\nold\n<!-- /bench:model -->\n\nend\n"


def write_readme(folder: Path, text: str = MARKERS) -> Path:
    readme = folder / "README.md"
    readme.write_text(text)
    return readme


def run_report(readme: Path, results: Path, *flags: str) -> int:
    return report.main(["--pages", str(readme.parent), "--results", str(results), *flags])


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
    assert cpu_and_threads(environment()) in text
    assert f"torch {environment()['torch']}" in text
    assert f"commit {environment()['commit']}" in text
    assert run_report(readme, quick.parent, "--check") == 0


def test_the_report_says_what_is_missing(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    readme = write_readme(tmp_path)
    assert run_report(readme, empty) == 1
    assert "no results" in capsys.readouterr().err
    assert run_report(write_readme(tmp_path, "# nothing\n"), quick.parent) == 1
    assert "<!-- bench:model -->" in capsys.readouterr().err
    (empty / "model.jsonl").write_text("{broken\n")
    assert run_report(readme, empty, "--check") == 1
    assert "model.jsonl:1 is not JSON" in capsys.readouterr().err


def test_a_table_may_stand_on_any_one_page(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, page = write_readme(tmp_path, "# nothing\n"), tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    page.write_text(MARKERS)
    assert run_report(readme, quick.parent) == 0
    assert "old" not in page.read_text()
    assert readme.read_text() == "# nothing\n"
    write_readme(tmp_path)
    assert run_report(readme, quick.parent) == 1
    assert "found 2 pairs" in capsys.readouterr().err


ELSEWHERE = {
    "cpu_name": "Another",
    "cpu_vendor": "GenuineIntel",
    "cpu_family": 6,
    "cpu_model": 143,
    "cpu_stepping": 8,
    "cpu_flags": ["amx_bf16", "avx512_bf16"],
}
AT_A_GLANCE = "**Speed-up on every CPU"
NAMES = sorted({record["benchmark"] for record in report.read_results(RESULTS)})


def measured_elsewhere(record: dict) -> dict:
    """The record of another CPU, with other numbers in it."""
    found = copy.deepcopy(record)
    found["environment"].update(ELSEWHERE)
    for number in ("top1", "passed", "score_error", "matmul_gflops"):
        if number in found:
            found[number] /= 2
    for numbers in (found.get("time_ms", {}), found.get("ratios", {}), *found.get("speedup", {}).values()):
        numbers.update({name: value / 2 for name, value in numbers.items() if name not in ("n", "samples")})
    return found


def tables_of(records: list[dict]) -> tuple[str, list[str]]:
    """The table with a column per CPU, "" where there is none, and the others in alphabetical order."""
    tables = report.section(records).replace("\n\n**", "\f**").split("\f")
    glance = tables.pop(0) if tables[0].startswith(AT_A_GLANCE) else ""
    return glance, sorted(tables)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "criteria"])  # whose runs all count, in one table
@pytest.mark.parametrize("order", ["after", "before", "among"])
def test_lines_of_another_cpu_add_to_a_page_and_change_no_table_on_it(name, order):
    here = [record for record in report.read_results(RESULTS) if record["benchmark"] == name]
    there = [measured_elsewhere(record) for record in here]
    among = [record for pair in zip(here, there) for record in pair]
    both = {"after": [*here, *there], "before": [*there, *here], "among": among}[order]
    (glance, tables), (_, own), (_, other) = map(tables_of, (both, here, there))
    assert not set(own) & set(other)
    assert tables == sorted(own + other)
    labels = {cpu_and_threads(record["environment"]) for record in both}
    assert all(label in glance for label in labels) if "speedup" in here[0] else not glance


def test_the_lines_of_a_run_on_another_cpu_add_a_column_to_the_page(quick: Path, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", write_readme(tmp_path)
    results.mkdir()
    lines = quick.read_text().splitlines()
    (results / "model.jsonl").write_text("\n".join(lines) + "\n")
    assert run_report(readme, results) == 0
    before = readme.read_text()
    assert AT_A_GLANCE not in before
    (results / "other.jsonl").write_text("\n".join(json.dumps(measured_elsewhere(json.loads(line))) for line in lines))
    assert run_report(readme, results) == 0
    after = readme.read_text()
    assert f"| {cpu_and_threads(environment())} | Sapphire Rapids, Another (" in after
    own = before.partition("<!-- bench:model -->\n")[2].partition("\n<!-- /bench:model -->")[0]
    assert own in after


def test_the_pages_show_the_recorded_results():
    assert report.main(["--check"]) == 0
