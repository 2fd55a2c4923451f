"""Logs are read back as they were meant, and runs are told apart."""

import pytest

from ffvt.report.runs import number_in, read_runs
from ffvt.train.runlog import read_log
from tests.report.logs import write_lines, write_log


def test_a_resumed_run_counts_what_it_made_again_only_once(tmp_path):
    again = [{"kind": "resume", "step": 3}, {"kind": "train", "step": 4, "loss": 9.0}, {"kind": "end", "step": 4}]
    log = read_log(write_log(tmp_path / "run", "run", 6, lines=again))
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["loss"] for line in log if line["kind"] == "train"][-1] == 9.0
    assert not [line for line in log if line["kind"] == "evaluate"]  # of step 6


def test_a_run_that_was_resumed_twice_keeps_what_was_made_last(tmp_path):
    again = [{"kind": "resume", "step": 4}, {"kind": "train", "step": 5, "loss": 8.0}]
    again += [{"kind": "resume", "step": 2}, {"kind": "train", "step": 3, "loss": 9.0}]
    (run,) = read_runs([write_log(tmp_path / "run", "run", 6, lines=again)])
    assert run.series("train", "loss") == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_last_line_that_was_cut_off_is_passed_over_and_another_is_named(tmp_path):
    folder = write_log(tmp_path / "run", "run", 2)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert len(read_log(folder)) == 4
    assert read_log(folder / "log.jsonl") == read_log(folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"log: every line must be a JSON object with a kind; got .*log\.jsonl:5"):
        read_log(folder)
    with pytest.raises(FileNotFoundError, match=r"must have a log\.jsonl; got .*nowhere"):
        read_log(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1]", b'{"step": 1}', b'{"kind": 1}', b'"kind"', b'{"kind": "resume"}']
)
def test_a_damaged_line_is_named_by_its_file_and_number(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"kind": "run"}\n' + line + b'\n{"kind": "end"}\n')
    with pytest.raises(ValueError, match=r"log: every line must be .*log\.jsonl:2$"):
        read_log(tmp_path)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = ["x/a", "x/b", "y/b", "c"]
    paths = [write_log(tmp_path / name, "same" if name != "c" else "own", 2) for name in folders]
    assert [run.name for run in read_runs(paths)] == ["same (x/a)", "same (x/b)", "same (y/b)", "own"]
    assert [run.name for run in read_runs(paths[:2])] == ["same (a)", "same (b)"]
    assert [run.name for run in read_runs([paths[0], paths[0] / "log.jsonl", paths[3]])] == ["same", "own"]
    assert read_runs([write_lines(tmp_path / "nameless", [{"kind": "run"}])])[0].name == "nameless"


def test_a_number_is_found_inside_of_its_line_and_nothing_else_passes_for_one():
    line = {"a": {"b": 2, "c": None, "d": float("nan"), "e": "3"}, "f": 1}
    assert number_in(line, "a.b") == 2
    assert number_in(line, "f") == 1
    assert {number_in(line, key) for key in ("a", "a.c", "a.d", "a.e", "f.b", "nowhere", "a.nowhere")} == {None}
