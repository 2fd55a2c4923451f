"""`ffvt plot`: logs are read back as they were meant, and every panel shows what is in them."""

import json

import pytest
from PIL import Image

from ffvt.__main__ import main
from ffvt.report.comparison import comparison_figure, summary_table
from ffvt.report.runs import read_log, read_runs
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.test_train import SMALL

SELECTION = {"class_token_rate": 0.1, "layer_overlap": 0.3, "hit_rate": 0.4, "random_hit_rate": 0.09}


def write_log(folder, name, steps, fused=True, lines=()):
    folder.mkdir(parents=True, exist_ok=True)
    log = [{"kind": "run", "options": {"name": name}}]
    for step in range(1, steps + 1):
        log.append({"kind": "train", "step": step, "loss": 1 / step, "lr": 0.1, "images_per_second": 5.0, "mfu": None})
    score = {"step": steps, "split": "test", "top1": 0.5, "loss": 0.1, "selection": SELECTION if fused else None}
    log.append({"kind": "evaluate", **score})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, *lines]))
    return folder


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_resumed_run_counts_what_it_made_again_only_once(tmp_path):
    again = [{"kind": "resume", "step": 3}, {"kind": "train", "step": 4, "loss": 9.0}, {"kind": "end", "step": 4}]
    log = read_log(write_log(tmp_path / "run", "run", 6, lines=again))
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["loss"] for line in log if line["kind"] == "train"][-1] == 9.0
    assert not [line for line in log if line["kind"] == "evaluate"]  # of step 6


def test_a_last_line_that_was_cut_off_is_passed_over_and_another_is_named(tmp_path):
    folder = write_log(tmp_path / "run", "run", 2)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert len(read_log(folder)) == 4
    with (folder / "log.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:5"):
        read_log(folder)
    with pytest.raises(FileNotFoundError, match=r"must have a log\.jsonl; got .*nowhere"):
        read_log(tmp_path / "nowhere")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [write_log(tmp_path / name, "same" if name != "c" else "own", 2) for name in "abc"]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "own"]


def test_panels_show_the_numbers_of_the_logs_and_none_is_empty(tmp_path):
    fused, plain = write_log(tmp_path / "a", "fused", 3), write_log(tmp_path / "b", "plain", 4, fused=False)
    figure = comparison_figure(read_runs([fused, plain]))
    shown = titles(figure)
    assert "Picks on the object (dashed: random)" in shown
    assert "Share of the matmul rate (MFU)" not in shown  # no line has one
    loss = figure.axes[shown.index("Training loss")]
    drawn = [list(line.get_ydata()) for line in loss.lines if len(line.get_ydata())]
    assert drawn == [[1, 1 / 2, 1 / 3], [1, 1 / 2, 1 / 3, 1 / 4]]
    hits = figure.axes[shown.index("Picks on the object (dashed: random)")]
    assert [list(line.get_ydata()) for line in hits.lines] == [[0.4], [0.09]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fused", "plain"]
    only = titles(comparison_figure(read_runs([plain])))
    assert not [title for title in only if "pick" in title.lower()]


def test_long_lines_are_smoothed_and_many_runs_have_colours_of_their_own(tmp_path):
    runs = read_runs([write_log(tmp_path / f"{i}", f"run {i}", 100) for i in range(12)])
    figure = comparison_figure(runs)
    loss = figure.axes[titles(figure).index("Training loss")]
    faint, mean = loss.lines[:2]
    assert faint.get_alpha() < 1
    assert faint.get_ydata()[50] == 1 / 51
    assert mean.get_ydata()[50] == pytest.approx(sum(1 / step for step in range(46, 57)) / 11)
    assert len({str(line.get_color()) for line in loss.lines}) == 12


def test_nothing_to_draw_is_an_error(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "run", "options": {"name": "idle"}}\n')
    with pytest.raises(ValueError, match="got nothing to draw in idle"):
        comparison_figure(read_runs([tmp_path]))
    assert "idle" in summary_table(read_runs([tmp_path]))


def test_real_runs_are_compared_from_the_command_line(tmp_path, capsys):
    for name, changes in (("fused", {"val_split": 0.2}), ("plain", {"feature_fusion": False})):
        train(TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path), name=name))
    output = tmp_path / "comparison.png"
    assert main(["plot", str(tmp_path / "fused"), str(tmp_path / "plain"), "--output", str(output)]) == 0
    with Image.open(output) as image:
        assert image.width > 800
    header, fused, plain, path = capsys.readouterr().out.splitlines()[-4:]
    assert header.split()[:2] == ["run", "steps"]
    assert fused.split()[:2] == ["fused", "6"]
    assert plain.split()[-3:] == ["-", "-", "-"]
    assert path == str(output)
