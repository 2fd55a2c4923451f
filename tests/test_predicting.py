"""`ffvt predict`: which images it finds, what it writes of each, and what a bad one costs."""

import csv
import io
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ffvt
from ffvt.cli import main
from ffvt.inference import Refused
from ffvt.predicting import find_images, write_predictions
from tests.helpers import write_checkpoint

CLASSES = ("crow", "blue jay", "kite")


@pytest.fixture
def run(tmp_path):
    return str(write_checkpoint(tmp_path / "run", CLASSES))


@pytest.fixture
def photos(tmp_path):
    """b.png, a.jpg, hidden and other files, sub/c.png and a broken file."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.jpg", ".hidden.png", "sub/c.PNG", ".cache/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 24), 80).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def names(found, folder):
    return [str(Path(image).relative_to(folder)) for image in found]


def predict(run, *arguments):
    return main(["predict", "--checkpoint", run, *map(str, arguments)])


def test_a_folder_gives_its_images_sorted_and_below_and_nothing_hidden(photos):
    assert names(find_images([str(photos)]), photos) == ["a.jpg", "b.png", "sub/c.PNG"]


def test_lists_give_files_and_folders_in_their_order(photos, monkeypatch):
    (photos / "list.txt").write_bytes(f"{photos}/sub\r\n\n{photos}/b.png\n".encode())
    stdin = type("", (), {"buffer": io.BytesIO(f"{photos}/a.jpg\n".encode())})
    monkeypatch.setattr(sys, "stdin", stdin)
    sources = [f"@{photos}/list.txt", "-", str(photos / "notes.txt")]
    found = list(find_images(sources, [str(photos / "list.txt")]))
    assert names(found, photos) == ["sub/c.PNG", "b.png", "a.jpg", "notes.txt", "sub/c.PNG", "b.png"]


def test_a_circle_of_links_is_gone_round_once(photos):
    (photos / "sub" / "up").symlink_to(photos)
    assert names(find_images([str(photos)]), photos) == ["a.jpg", "b.png", "sub/c.PNG"]
    (photos / "sub" / "up").unlink()
    elsewhere = photos.parent / "elsewhere"
    (photos / "sub").rename(elsewhere)
    (photos / "sub").symlink_to(elsewhere)
    assert names(find_images([str(photos)]), photos) == ["a.jpg", "b.png", "sub/c.PNG"]


def test_a_link_to_itself_costs_its_own_line(photos):
    (photos / "loop").symlink_to("loop")
    *images, refused = sorted(find_images([str(photos)]), key=lambda found: isinstance(found, Refused))
    assert names(images, photos) == ["a.jpg", "b.png", "sub/c.PNG"]
    assert (refused.name, type(refused.error)) == (str(photos / "loop"), OSError)


def test_an_empty_folder_and_a_missing_list_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    empty, missing = find_images([str(tmp_path / "empty"), "@nowhere.txt"])
    assert isinstance(empty, Refused)
    assert "no images" in str(empty.error)
    assert missing.name == "@nowhere.txt"


def test_one_image_gets_a_block_and_many_get_a_line_each(run, photos, capsys):
    assert predict(run, photos / "a.jpg") == 0
    path, *rows = capsys.readouterr().out.splitlines()
    assert path == str(photos / "a.jpg")
    assert {row.split(maxsplit=1)[1] for row in rows} == set(CLASSES)
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert predict(run, photos, "--top", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(photos / name) for name in ("a.jpg", "b.png", "sub/c.PNG")]
    assert lines[0] == f"{photos / 'a.jpg'}: {shares[0]:.1f}% {rows[0].split(maxsplit=1)[1]}"


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_a_bad_file_costs_its_own_line_and_the_exit_status(run, photos, capsys, form):
    (photos / "bad.png").write_bytes(b"no picture")
    given = [photos / "a.jpg", photos / "bad.png", photos / "gone.png", photos / "b.png"]
    assert predict(run, *given, *([] if form == "text" else [f"--{form}"])) == 1
    out, err = capsys.readouterr()
    assert err.strip() == "ffvt predict: 2 of 4 images could not be read"
    if form == "text":
        lines = out.splitlines()
        failed = [line for line in lines if ": error: " in line]
        assert [line.split(": error: ")[0] for line in failed] == [str(path) for path in given[1:3]]
        assert failed[1].endswith("No such file or directory")
    elif form == "json":
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["image"] for line in lines] == [str(path) for path in given]
        assert ["error" in line for line in lines] == [False, True, True, False]
        assert sum(found["probability"] for found in lines[0]["predictions"]) == pytest.approx(1, abs=1e-5)
    else:
        header, *lines = csv.reader(out.splitlines())
        assert header == ["image", *(f"{x}_{n}" for n in (1, 2, 3) for x in ("class", "probability")), "error"]
        assert {len(line) for line in lines} == {8}
        assert [bool(line[-1]) for line in lines] == [False, True, True, False]
        assert lines[0][1] in CLASSES


def test_an_output_file_gets_the_lines_instead_of_the_terminal(run, photos, tmp_path, capsys):
    output = tmp_path / "found.jsonl"
    assert predict(run, photos, "--json", "--output", output) == 0
    assert capsys.readouterr().out == ""
    assert len(output.read_text().splitlines()) == 3


def test_names_cannot_act_on_a_terminal(tmp_path, photos, capsys):
    run = write_checkpoint(tmp_path / "odd", ("\x1b[31mred", "\u202eback"))
    odd = photos / "\x1b]0;pwned\x07.png"
    (photos / "b.png").rename(odd)
    for form in ([], ["--json"]):
        predict(str(run), odd, *form)
        assert capsys.readouterr().out.replace("\n", "").isprintable()
    write_predictions(ffvt.load(run), [odd], terminal := Terminal(), "csv")
    assert terminal.getvalue().replace("\n", "").isprintable()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_names_that_are_no_unicode_are_written_by_every_form(run, photos, tmp_path, capsys):
    odd = os.fsencode(photos) + b"/caf\xe9.png"
    os.rename(photos / "b.png", odd)
    for form in ("text", "json", "csv"):
        output = tmp_path / form
        assert predict(run, os.fsdecode(odd), *([] if form == "text" else [f"--{form}"]), "--output", output) == 0
        assert "caf\\udce9.png" in output.read_bytes().decode()


def test_results_are_out_before_the_next_images_are_read(run):
    classifier, seen = ffvt.load(run, batch_size=2), []
    to = io.StringIO()

    def images():
        for _ in range(9):
            seen.append(to.getvalue().count("\n"))
            yield torch.zeros(3, 8, 8, dtype=torch.uint8)

    assert write_predictions(classifier, images(), to, "json", threads=0) == (9, 0)
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(run):
    classifier = ffvt.load(run, batch_size=32)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def images(count):
        for _ in range(count):
            yield torch.zeros(3, 64, 64, dtype=torch.uint8)

    with open(os.devnull, "w") as nowhere:
        write_predictions(classifier, images(100), nowhere, threads=2)
        before = resident()
        assert write_predictions(classifier, images(3000), nowhere, threads=2) == (3000, 0)
    assert resident() - before < 20e6  # as the model sees them, their pixels alone are 147 MB


def test_what_cannot_work_is_refused_in_one_line(run, photos, tmp_path, capsys):
    answers = tmp_path / "answers.txt"
    answers.write_text("a.jpg: 98.1% kite\n")
    for arguments, message in (
        ([photos, "--top", "0"], "top must be at least 1; got top=0"),
        ([photos, "--batch_size", "0"], "got batch_size=0"),
        ([photos, "--workers", "-1"], "got workers=-1"),
        ([], "images must be given"),
        ([photos, "--output", photos / "a.jpg"], "output must be a text file"),
        ([photos, "--output", photos], "output must be a text file"),
        ([photos, "--output", tmp_path / "missing" / "x.txt"], "folder of output must exist"),
        ([photos, "--output", photos / "notes.txt"], "new or earlier answers as text, other files stay"),
        ([photos, "--csv", "--output", answers], "new or earlier answers as csv, other files stay"),
        ([f"@{answers}", "--output", answers], "none of the images and lists"),
        (["--list", answers, "--output", answers], "none of the images and lists"),
    ):
        assert predict(run, *arguments) == 1
        err = capsys.readouterr().err.strip()
        assert message in err
        assert "\n" not in err
    assert (photos / "a.jpg").stat().st_size > 0
    assert answers.read_text() == "a.jpg: 98.1% kite\n"


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_earlier_answers_of_the_same_form_are_replaced(run, photos, tmp_path, form):
    output, flag = tmp_path / "found", [] if form == "text" else [f"--{form}"]
    for given in ([photos], [photos / "a.jpg"], [photos / "gone.png"], [photos]):
        output.touch()
        assert predict(run, *given, *flag, "--output", output) == (given == [photos / "gone.png"])
    assert len(output.read_text().splitlines()) == 3 + (form == "csv")


def test_a_problem_is_told_without_the_images_name_whatever_it_is(run, photos, capsys):
    odd = photos / "it's.png"
    odd.write_bytes(b"no picture")
    assert predict(run, odd) == 1
    assert capsys.readouterr().out.startswith(f"{odd}: error: it is none of JPEG")
