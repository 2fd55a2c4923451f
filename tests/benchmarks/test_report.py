"""The report fills the pages' markers, and the pages show the recorded results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import environment
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
    assert ("AMX (" in text) != ("no AMX" in text)
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


def test_the_pages_show_the_recorded_results():
    assert report.main(["--check"]) == 0
