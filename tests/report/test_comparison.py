"""`ffvt plot`: every panel shows what is in the logs, and so does the table."""

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from ffvt.cli import main
from ffvt.report.comparison import comparison_figure, summary_table
from ffvt.report.page import png
from ffvt.report.runs import read_runs
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL
from tests.report.logs import SELECTION, evaluation, write_lines, write_log


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def panel(figure, title):
    return figure.axes[titles(figure).index(title)]


def curves(axes):
    return [list(zip(*line.get_data())) for line in axes.lines]


def table_cells(runs):
    header, *rows = summary_table(runs).splitlines()
    names = ["run", "steps", "split", "last", "best", "images/s", "class token", "overlap", "hit rate", "random"]
    assert len(header.split()) == len(names) + 4  # "last top-1" and so on are two words
    return [dict(zip(names, row.split())) for row in rows]


def test_a_run_that_was_resumed_after_its_end_does_not_report_that_end(tmp_path):
    end = {"kind": "end", "last": {"top1": 0.5}, "best": {"top1": 0.5}}
    more = [end, {"kind": "resume", "step": 6}, {"kind": "train", "step": 7, "loss": 0.1}, evaluation(7, 0.9)]
    (cells,) = table_cells(read_runs([write_log(tmp_path / "run", "run", 6, lines=more)]))
    assert (cells["steps"], cells["last"], cells["best"]) == ("7", "0.9000", "0.9000")


def test_panels_show_the_numbers_of_the_logs_and_none_is_empty(tmp_path):
    fused, plain = write_log(tmp_path / "a", "fused", 3), write_log(tmp_path / "b", "plain", 4, fused=False)
    figure = comparison_figure(read_runs([fused, plain]))
    shown = titles(figure)
    assert shown[:4] == ["Training loss", "Top-1", "Learning rate", "Images per second"]
    assert "Share of the matmul rate (MFU)" not in shown  # no line has one
    assert all(axes.lines for axes in figure.axes)
    loss = panel(figure, "Training loss")
    assert [[value for _, value in curve] for curve in curves(loss)] == [[1, 1 / 2, 1 / 3], [1, 1 / 2, 1 / 3, 1 / 4]]
    hits = panel(figure, "Picks on the object (dashed: random)")
    rate, chance = hits.lines
    assert curves(hits)[0] == [(3, 0.4)]
    assert (list(chance.get_ydata()), chance.get_linestyle()) == ([0.09, 0.09], "--")
    assert rate.get_color() == loss.lines[0].get_color() != loss.lines[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fused", "plain"]
    only = titles(comparison_figure(read_runs([plain])))
    assert not [title for title in only if "pick" in title.lower()]


def test_every_kind_of_random_rate_is_drawn_in_its_runs_colour(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        write_lines(tmp_path / name, [evaluation(5, 0.5, selection={**SELECTION, "random_hit_rate": rate})])
    hits = panel(comparison_figure(read_runs([tmp_path / "a", tmp_path / "b"])), "Picks on the object (dashed: random)")
    rates = [line.get_color() for line in hits.lines if line.get_linestyle() != "--"]
    dashed = {line.get_ydata()[0]: line.get_color() for line in hits.lines if line.get_linestyle() == "--"}
    assert dashed == {0.1: rates[0], 0.2: rates[1]}


def test_val_and_test_are_told_apart_and_the_best_is_of_the_split_it_was_chosen_on(tmp_path):
    lines = [{"kind": "run", "options": {"name": "run"}}, evaluation(10, 0.9), evaluation(10, 0.4, "val")]
    lines += [evaluation(20, 0.7, "val"), evaluation(20, 0.6), evaluation(30, 0.5, "val")]
    lines += [evaluation(30, 0.55, model="last"), evaluation(20, 0.7, model="best")]
    (run,) = read_runs([write_lines(tmp_path / "run", lines)])
    axes = panel(comparison_figure([run]), "Top-1")
    drawn = {
        (line.get_marker(), line.get_markerfacecolor() == "white"): curve
        for line, curve in zip(axes.lines, curves(axes))
    }
    assert drawn[("o", True)] == [(10, 0.4), (20, 0.7), (30, 0.5)]  # val, hollow
    assert drawn[("o", False)] == [(10, 0.9), (20, 0.6)]
    assert drawn[("D", False)] == [(30, 0.55), (20, 0.7)]
    assert drawn[("*", False)] == [(20, 0.7)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["test", "test, at the end", "val", "best"]
    (cells,) = table_cells([run])  # killed before its end: of val, which it was to choose on
    assert (cells["split"], cells["last"], cells["best"]) == ("val", "0.5000", "0.7000")


def test_a_finished_run_is_tabled_by_what_it_reports(tmp_path):
    score = {"top1": 0.55, "selection": SELECTION}
    lines = [
        {"kind": "run", "options": {"name": "run"}},
        evaluation(20, 0.9, "val"),
        evaluation(20, 0.55, model="last"),
    ]
    lines += [{"kind": "end", "step": 20, "last": score, "best": {"top1": 0.6}}]
    (cells,) = table_cells(read_runs([write_lines(tmp_path / "run", lines)]))
    assert (cells["split"], cells["last"], cells["best"]) == ("test", "0.5500", "0.6000")
    picks = [cells[name] for name in ("class token", "overlap", "hit rate", "random")]
    assert picks == ["10.0%", "30.0%", "40.0%", "9.0%"]


def test_missing_keys_and_nulls_are_passed_over(tmp_path):
    lines = [
        {"kind": "run"},
        {"kind": "train"},
        {"kind": "train", "step": 1},
        {"kind": "train", "step": 2, "loss": None},
    ]
    lines += [{"kind": "train", "step": 3, "loss": 2}, {"kind": "evaluate"}, evaluation(3, None), evaluation(4, 1)]
    lines += [{"kind": "unknown", "loss": 7}, {"kind": "end", "last": None, "best": None}]
    runs = read_runs([write_lines(tmp_path / "run", lines)])
    figure = comparison_figure(runs)
    assert curves(panel(figure, "Training loss")) == [[(3, 2)]]
    assert titles(figure) == ["Training loss", "Top-1"]
    assert png(figure)
    (cells,) = table_cells(runs)
    assert (cells["steps"], cells["images/s"], cells["hit rate"]) == ("4", "-", "-")


def test_a_run_that_was_only_evaluated_is_drawn(tmp_path):
    figure = comparison_figure(read_runs([write_lines(tmp_path / "run", [evaluation(5, 0.5)])]))
    assert titles(figure) == ["Top-1"]
    assert curves(figure.axes[0])[0] == [(5, 0.5)]


def test_long_lines_are_smoothed_and_many_runs_have_colours_of_their_own(tmp_path):
    runs = read_runs([write_log(tmp_path / f"{i}", f"run {i}", 100) for i in range(12)])
    figure = comparison_figure(runs)
    faint, mean = panel(figure, "Training loss").lines[:2]
    assert faint.get_alpha() < 1
    assert faint.get_ydata()[50] == 1 / 51
    assert mean.get_ydata()[50] == pytest.approx(sum(1 / step for step in range(46, 57)) / 11)
    assert mean.get_ydata()[0] == pytest.approx(sum(1 / step for step in range(1, 7)) / 6)
    for count in (8, 12):
        figure = comparison_figure(runs[:count])
        orders = []
        for title in ("Training loss", "Learning rate", "Layers that pick the class token"):
            lines = panel(figure, title).lines
            orders.append(list(dict.fromkeys(to_hex(line.get_color()) for line in lines)))
        assert orders[0] == orders[1] == orders[2]
        assert len(orders[0]) == count
        assert [to_hex(line.get_color()) for line in figure.legends[0].get_lines()] == orders[0]


def test_names_are_shown_as_they_are_and_long_ones_fit_the_picture(tmp_path):
    names = ["_hidden", "$a^$", "long" * 60]
    figure = comparison_figure(read_runs([write_log(tmp_path / f"{i}", name, 2) for i, name in enumerate(names)]))
    png(figure)
    legend = figure.legends[0]
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:2] == names[:2]
    assert shown[2].startswith("longlong")
    assert "…" in shown[2]
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_nothing_to_draw_is_an_error(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "run", "options": {"name": "idle"}}\n')
    with pytest.raises(ValueError, match="got nothing to draw in idle"):
        comparison_figure(read_runs([tmp_path]))
    assert "idle" in summary_table(read_runs([tmp_path]))


@pytest.mark.slow
def test_real_runs_are_compared_from_the_command_line(tmp_path, capsys):
    for name, changes in (("fused", {"val_split": 0.2}), ("plain", {"feature_fusion": False})):
        train(TrainOptions(**{**SMALL, **changes}, output_dir=str(tmp_path), name=name))
    output = tmp_path / "pictures" / "comparison.png"
    output.parent.mkdir()
    assert main(["plot", str(tmp_path / "fused"), str(tmp_path / "plain"), "--output", str(output)]) == 0
    with Image.open(output) as image:
        assert image.width > 800
    assert list(output.parent.iterdir()) == [output]  # no half-written file beside it
    header, fused, plain, path = capsys.readouterr().out.splitlines()[-4:]
    assert header.split()[:3] == ["run", "steps", "split"]
    assert fused.split()[:3] == ["fused", "6", "test"]
    assert plain.split()[-4:] == ["-", "-", "-", "-"]
    assert path == str(output)


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_read(tmp_path, capsys):
    assert main(["plot", "nowhere", "--output", str(tmp_path / "a.xyz")]) == 1
    assert "plot: output must end in .png, .jpg" in capsys.readouterr().err
    assert main(["plot", "nowhere", "--output", str(tmp_path / "missing" / "a.png")]) == 1
    assert "plot: the folder of output must exist; got output=" in capsys.readouterr().err
