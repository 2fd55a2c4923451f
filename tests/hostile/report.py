"""Predict, visualize, evaluate and plot with bad images, names, classes, lists, outputs, checkpoints and logs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import ffvt
from ffvt.cli import main
from tests.hostile.case import Case
from tests.report.logs import evaluation, write_lines, write_log

ODD_NAMES = {  # of files and classes
    "escape codes": "\x1b]0;pwned\x07\x1b[2J",
    "a line break": "first\nsecond",
    "markup": "<script>alert(1)</script><!--",
    "quotes": "\"'`&quot;",
    "dollars": "$\\frac{$",
    "text that turns round": "\u202egnp.exe",
    "an emoji": "🥑",
    "a formula": "=1+1,2",
    "200 letters": "long" * 50,
    "a closing tag of a script": "</script></style></article>",
    "percent signs": "%s%n{0}",
}


def checkpoint(folder: Path, classes: tuple[str, ...] = ("a", "b", "c"), **options: object) -> Path:
    """A run with a tiny random model; imported late, as the tests' helpers need pytest."""
    from tests.helpers import write_checkpoint

    return write_checkpoint(folder / "run", classes, **options)


def image(path: Path, size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert("RGB").save(path, "PNG")
    return path


def said(*arguments: object, status: int = 0, stdin: bytes = b"") -> tuple[str, str]:
    """What a command writes to its two outputs; it must end with this status, and show a terminal nothing odd."""
    out, err = io.StringIO(), io.StringIO()
    stream = mock.Mock(buffer=io.BytesIO(stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", stream):
        found = main([str(argument) for argument in arguments])
    assert found == status, f"ended with {found}: {err.getvalue()}"
    for text in (out.getvalue(), err.getvalue()):
        assert text.replace("\n", "").isprintable(), f"unprintable: {text!r}"
        assert "Traceback" not in text
    assert all(len(line) < 1000 for line in err.getvalue().splitlines())
    return out.getvalue(), err.getvalue()


def refused(*arguments: object, stdin: bytes = b"") -> None:
    """Raises what the command says in its one line."""
    out, err = said(*arguments, status=1, stdin=stdin)
    assert err.count("\n") == 1, err
    assert not out, out
    raise ValueError(err.strip())


def predict(folder: Path, *arguments: object, **more: object) -> list[dict]:
    """The JSON lines of `ffvt predict`."""
    out, _ = said("predict", "--checkpoint", folder / "run", "--json", "--workers", 0, *arguments, **more)
    return [json.loads(line) for line in out.splitlines()]


def beside_a_good_one(make: Callable[[Path], object], name: str = "bad.png") -> Callable[[Path], None]:
    """A bad file costs its own line of every form, and the good ones around it are answered."""

    def attempt(folder: Path) -> None:
        checkpoint(folder)
        good, bad, last = image(folder / "good.png"), folder / name, image(folder / "last.png")
        make(bad)
        lines = predict(folder, good, bad, last, status=1)
        assert ["predictions" in line for line in lines] == [True, False, True], lines
        assert 0 < len(lines[1]["error"]) < 300
        page = folder / "page.html"
        _, err = said(
            "visualize", "--checkpoint", folder / "run", "--workers", 2, good, bad, "--output", page, status=1
        )
        assert name in err
        assert page.read_text().count("<article") == 1
        assert not list(folder.parent.rglob("escaped.txt"))

    return attempt


def half_a_jpeg(path: Path) -> None:
    Image.effect_noise((300, 300), 80).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def in_a_name(name: str) -> Callable[[Path], None]:
    """A file's name goes through every form of predict and stays text on the page."""

    def attempt(folder: Path) -> None:
        checkpoint(folder)
        path = image(folder / f"{name.replace('/', '_')}.png")
        (line,) = predict(folder, path)
        assert line["image"] == str(path)
        said("predict", "--checkpoint", folder / "run", path)
        said("predict", "--checkpoint", folder / "run", "--csv", "--output", folder / "o.csv", path)
        _, row = csv.reader((folder / "o.csv").read_text().splitlines(keepends=True))
        assert row[0] == str(path)
        said("visualize", "--checkpoint", folder / "run", "--output", folder / "p.html", path)
        stays_text(folder / "p.html")

    return attempt


def of_a_class(name: str) -> Callable[[Path], None]:
    """A class's name goes through predict, evaluate, page and figure."""

    def attempt(folder: Path) -> None:
        classes = (name.replace("/", "_"), "other")
        for split in ("train", "test"):
            for one in classes:
                image(folder / "set" / split / one / "0.png")
        checkpoint(folder, classes, data_root=str(folder / "set"))
        (line,) = predict(folder, folder / "set" / "test" / "other" / "0.png")
        assert {found["class"] for found in line["predictions"]} == set(classes)
        run = ("--checkpoint", folder / "run")
        said("predict", *run, folder / "set" / "test")
        said("evaluate", *run, "--per_class", "--confusion", folder / "c.png", "--predictions", folder / "p.csv")
        out, _ = said("evaluate", *run, "--json", "--per_class", "--confusion", folder / "c.csv")
        assert set(json.loads(out)["per_class"]) == set(classes)
        said("visualize", *run, "--output", folder / "p.html", folder / "set" / "test")
        stays_text(folder / "p.html")
        said("visualize", *run, "--output", folder / "p.svg", folder / "set" / "test" / "other")

    return attempt


def stays_text(page: Path) -> None:
    from tests.report.test_gallery import Structure

    structure = Structure(page.read_text(encoding="utf-8"))
    assert len(structure.of("script")) == 1
    assert len(structure.of("style")) == 1
    assert structure.of("footer"), "the page ends early"
    assert all(one["src"].startswith("data:") for one in structure.of("img"))


def output_stays(command: str, name: str, content: bytes) -> Callable[[Path], None]:
    """A file that is not the command's own is refused as its output, and stays."""

    def attempt(folder: Path) -> None:
        checkpoint(folder)
        write_log(folder / "log", "log", 3)
        path = folder / name
        path.write_bytes(content)
        given = {
            "visualize": ["--checkpoint", folder / "run", image(folder / "x.png")],
            "predict": ["--checkpoint", folder / "run", image(folder / "x.png")],
            "plot": [folder / "log"],
        }[command]
        try:
            refused(command, *given, "--output", path)
        finally:
            assert path.read_bytes() == content

    return attempt


def a_bad_output(command: str, output: str, *more: str) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        checkpoint(folder, data_root=str(folder / "set"))
        write_log(folder / "log", "log", 3)
        (folder / "there").mkdir()
        for split in ("train", "test"):
            for name in "abc":
                image(folder / "set" / split / name / "0.png")
        inputs = [folder / "log"] if command == "plot" else ["--checkpoint", folder / "run"]
        inputs += [folder / "set" / "test"] if command in ("predict", "visualize") else []
        refused(command, *inputs, *more, folder / output)

    return attempt


def a_bad_flag(command: str, *flags: object) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        checkpoint(folder)
        refused(command, "--checkpoint", folder / "run", *flags)

    return attempt


def a_list(content: bytes, answered: int, failed: int) -> Callable[[Path], None]:
    """A list on standard input, with paths below the case's folder."""

    def attempt(folder: Path) -> None:
        checkpoint(folder)
        image(folder / "1.png")
        image(folder / "2.png")
        given = content.replace(b"DIR", os.fsencode(folder))
        lines = predict(folder, "-", stdin=given, status=1 if failed else 0)
        assert sum("predictions" in line for line in lines) == answered, lines
        assert sum("error" in line for line in lines) == failed, lines

    return attempt


def a_circle_of_links(folder: Path) -> None:
    checkpoint(folder)
    image(folder / "photos" / "1.png")
    (folder / "photos" / "again").symlink_to(folder / "photos")
    (folder / "photos" / "deeper").mkdir()
    (folder / "photos" / "deeper" / "up").symlink_to(folder)
    assert sum("predictions" in line for line in predict(folder, folder / "photos")) == 1


def an_empty_folder_among_others(folder: Path) -> None:
    checkpoint(folder)
    image(folder / "photos" / "1.png")
    (folder / "empty").mkdir()
    lines = predict(folder, folder / "empty", folder / "photos", status=1)
    assert ["error" in line for line in lines] == [True, False]


def a_folder_100_deep(folder: Path) -> None:
    checkpoint(folder)
    image(folder / "photos" / "1.png")
    deep = folder / "photos"
    for _ in range(100):
        deep = deep / "d"
    deep.mkdir(parents=True)
    assert len(predict(folder, folder / "photos")) == 1


def a_model_that_is_nan(folder: Path) -> None:
    from ffvt.inference import load

    classifier = load(checkpoint(folder))
    torch.nn.init.constant_(classifier.model.head.weight, float("nan"))
    classifier(image(folder / "x.png"))


def a_tensor(pixels: torch.Tensor) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        ffvt.load(checkpoint(folder))(pixels)

    return attempt


def a_picture_of_another_kind(picture: object) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        ffvt.load(checkpoint(folder))([picture])

    return attempt


def one_class_alone(folder: Path) -> None:
    """No division by zero, and top-5 of one class."""
    for split in ("train", "test"):
        image(folder / "set" / split / "only" / "0.png")
    checkpoint(folder, ("only",), data_root=str(folder / "set"))
    out, _ = said("evaluate", "--checkpoint", folder / "run", "--per_class", "--confusion", folder / "c.png")
    assert "100.00%" in out
    assert "nan" not in out


def classes_without_images(folder: Path) -> None:
    for name in "abc":
        image(folder / "set" / "train" / name / "0.png")
    image(folder / "set" / "test" / "b" / "0.png")
    checkpoint(folder, data_root=str(folder / "set"))
    out, _ = said("evaluate", "--checkpoint", folder / "run", "--per_class", "--confusion", folder / "c.csv")
    assert "nan" not in out.lower()
    shown, _ = said("evaluate", "--checkpoint", folder / "run", "--per_class", "--json")
    assert json.loads(shown)["per_class"]["a"]["recall"] is None


def loss_that_is_not_finite(folder: Path) -> None:
    from ffvt.report.scores import score_json, score_table
    from tests.report.test_scores import evaluation as made

    found = made(["a", "b"], [0, 1], [0, 1], loss=float("inf"))
    json.dumps(score_json(found), allow_nan=False)
    assert "nan" not in score_table(found, "x")


def unreadable_test_image(folder: Path) -> None:
    for split in ("train", "test"):
        for name in "abc":
            image(folder / "set" / split / name / "0.png")
    half_a_jpeg(folder / "set" / "test" / "b" / "0.png")
    checkpoint(folder, data_root=str(folder / "set"))
    out, _ = said("evaluate", "--checkpoint", folder / "run", "--skip_bad_images", "--predictions", folder / "p.csv")
    assert "could not be read" in out
    assert len((folder / "p.csv").read_text().splitlines()) == 4
    refused("evaluate", "--checkpoint", folder / "run")


def evaluate_elsewhere(folder: Path) -> None:
    checkpoint(folder, data_root="not/here")
    refused("evaluate", "--checkpoint", folder / "run")


def a_log(*lines: object, raw: bytes = b"") -> Callable[[Path], None]:
    """A run's log that says odd things is drawn, or refused."""

    def attempt(folder: Path) -> None:
        write_lines(folder / "odd", list(lines))
        with (folder / "odd" / "log.jsonl").open("ab") as file:
            file.write(raw)
        said("plot", folder / "odd", "--output", folder / "p.png")
        assert (folder / "p.png").stat().st_size > 1000

    return attempt


def a_refused_log(*lines: object, raw: bytes = b"") -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        write_lines(folder / "odd", list(lines))
        with (folder / "odd" / "log.jsonl").open("ab") as file:
            file.write(raw)
        try:
            refused("plot", folder / "odd", "--output", folder / "p.png")
        finally:
            assert not (folder / "p.png").exists()

    return attempt


def thirty_runs(folder: Path) -> None:
    for number in range(30):
        write_log(folder / "runs" / str(number), f"run {number}", 2)
    said("plot", *sorted((folder / "runs").iterdir()), "--output", folder / "p.png")


RUN, STEP = {"kind": "run", "options": {"name": "run"}}, {"kind": "train", "step": 1, "loss": 1.0, "lr": 0.1}
PNG_BYTES = b"\x89PNG\r\n\x1a\n" + b"\0" * 40

CASES = [
    *(
        Case("report", f"predict and visualize: {name} beside good images", beside_a_good_one(make), None)
        for name, make in {
            "an empty file": lambda path: path.write_bytes(b""),
            "half a JPEG": half_a_jpeg,
            "text": lambda path: path.write_text("no image"),
            "a PNG without pixels": lambda path: path.write_bytes(PNG_BYTES),
            "a missing file": lambda path: None,
            "a link to nowhere": lambda path: path.symlink_to("nowhere"),
            "a link to itself": lambda path: path.symlink_to(path),
            "an empty folder named as an image": lambda path: path.mkdir(),
            "a bomb": lambda path: Image.new("1", (20000, 10000)).save(path),
            "a floating-point TIFF": lambda path: Image.new("F", (9, 9)).save(path, "TIFF"),
        }.items()
    ),
    *(Case("report", f"a file named with {name}", in_a_name(odd), None) for name, odd in ODD_NAMES.items()),
    *(Case("report", f"a class named with {name}", of_a_class(odd), None) for name, odd in ODD_NAMES.items()),
    *(
        Case("report", f"{command} over {what}", output_stays(command, name, content), name)
        for command, what, name, content in (
            ("visualize", "a page of somebody else", "mine.html", b"my notes"),
            ("visualize", "a text named as a figure", "mine.png", b"my notes"),
            ("visualize", "a script", "train.py", b"print()"),
            ("visualize", "a log", "log.jsonl", b"{}"),
            ("predict", "an image", "photo.jpg", b"\xff\xd8\xff my photo"),
            ("plot", "a text named as a figure", "notes.pdf", b"my notes"),
            ("plot", "a checkpoint's weights", "model.safetensors", b"weights"),
        )
    ),
    *(
        Case("report", f"{command} to {what}", a_bad_output(command, output, *more), output)
        for command, what, output, *more in (
            ("visualize", "a folder that is missing", "none/x.html", "--output"),
            ("visualize", "a figure in a folder that is missing", "none/x.png", "--output"),
            ("visualize", "a folder", "there", "--output"),
            ("visualize", "an unknown format", "x.docx", "--output"),
            ("predict", "a folder that is missing", "none/x.txt", "--output"),
            ("predict", "a folder", "there", "--output"),
            ("evaluate", "a confusion matrix in an unknown format", "x.xlsx", "--confusion"),
            ("evaluate", "a confusion matrix in a folder that is missing", "none/x.csv", "--confusion"),
            ("evaluate", "predictions in another format", "x.json", "--predictions"),
            ("evaluate", "predictions that are a folder", "there", "--predictions"),
            ("plot", "a folder", "there", "--output"),
            ("plot", "a folder that is missing", "none/x.svg", "--output"),
        )
    ),
    *(
        Case("report", f"{command} with {' '.join(map(str, flags))}", a_bad_flag(command, *flags), named)
        for command, flags, named in (
            ("predict", ("--top", 0, "x.png"), "got top=0"),
            ("predict", ("--top", -5, "x.png"), "got top=-5"),
            ("predict", ("--batch_size", 0, "x.png"), "got batch_size=0"),
            ("predict", ("--workers", -1, "x.png"), "got workers=-1"),
            ("predict", (), "images must be given"),
            ("visualize", (), "images must be given"),
            ("visualize", ("--max_size", 0, "x.png"), "got max_size=0"),
            ("visualize", ("--batch_size", -1, "x.png"), "got batch_size=-1"),
            ("evaluate", ("--batch_size", 0), "got batch_size=0"),
            ("evaluate", ("--workers", -1), "got workers=-1"),
        )
    ),
    *(
        Case("report", f"a list with {name}", a_list(content, answered, failed), None)
        for name, content, answered, failed in (
            ("Windows line ends and blank lines", b"DIR/1.png\r\n\r\n  \r\nDIR/2.png\r\n", 2, 0),
            ("no line end at its end", b"DIR/1.png\nDIR/2.png", 2, 0),
            ("the same image twice", b"DIR/1.png\nDIR/1.png\n", 2, 0),
            ("bytes that are no UTF-8", b"DIR/1.png\nDIR/caf\xe9.png\n", 1, 1),
            ("a NUL", b"DIR/1.png\nDIR/a\0b.png\n", 1, 1),
            ("a name of 100,000 letters", b"DIR/1.png\n" + b"x" * 100_000 + b"\n", 1, 1),
            ("binary rubbish", b"DIR/1.png\n" + bytes(range(11, 256)), 1, 1),
            ("names that look like flags", b"DIR/1.png\n--help\n", 1, 1),
        )
    ),
    Case("report", "a list without a name", lambda folder: refused_list(folder, b"\n\n"), "the lists must name images"),
    Case("report", "a circle of links", a_circle_of_links, None),
    Case("report", "an empty folder among others", an_empty_folder_among_others, None),
    Case("report", "a folder 100 deep", a_folder_100_deep, None),
    Case("report", "a model whose logits are NaN", a_model_that_is_nan, "must be finite"),
    *(
        Case("report", f"classifier({name})", a_tensor(pixels), named)
        for name, pixels, named in (
            ("a normalised tensor", torch.full((3, 8, 8), -2.0), "normalised ones go to .model"),
            ("a tensor of NaN", torch.full((3, 8, 8), float("nan")), "nan"),
            ("an empty tensor", torch.zeros(3, 0, 0), "(3, 0, 0)"),
            ("channels last", torch.zeros(8, 8, 3), "(8, 8, 3)"),
            ("integers", torch.zeros(3, 8, 8, dtype=torch.int32), "torch.int32"),
            ("five dimensions", torch.zeros(1, 2, 3, 8, 8), "(2, 3, 8, 8)"),
        )
    ),
    Case("report", "classifier([None])", a_picture_of_another_kind(None), "NoneType"),
    Case("report", "classifier([bytes])", a_picture_of_another_kind(b"x.png"), "bytes"),
    Case("report", "evaluate with one class", one_class_alone, None),
    Case("report", "evaluate with classes without images", classes_without_images, None),
    Case("report", "a loss that is infinite", loss_that_is_not_finite, None),
    Case("report", "evaluate with an unreadable image", unreadable_test_image, "0.png"),
    Case("report", "evaluate where the data set is elsewhere", evaluate_elsewhere, "--data_root"),
    *(
        Case("report", f"plot a log with {name}", a_log(*lines), None)
        for name, *lines in (
            *(
                (f"a run named with {what}", {"kind": "run", "options": {"name": odd}}, STEP)
                for what, odd in ODD_NAMES.items()
            ),
            ("a name that is a number", {"kind": "run", "options": {"name": 3}}, STEP),
            ("nulls and text for numbers", RUN, STEP, {"kind": "train", "step": 2, "loss": None, "lr": "high"}),
            ("infinite losses", RUN, STEP, {"kind": "train", "step": 2, "loss": 1e400}),
            ("losses of 1e308", RUN, STEP, {"kind": "train", "step": 2, "loss": 1e308}),
            ("negative losses and steps", RUN, STEP, {"kind": "train", "step": -7, "loss": -3.0}),
            ("a step of 10^15", RUN, STEP, {"kind": "train", "step": 10**15, "loss": 1.0}),
            ("a split named with escape codes", RUN, STEP, evaluation(1, 0.5, "\x1b[31mred$")),
            ("a split that is a list", RUN, STEP, evaluation(1, 0.5, ["test"])),
            ("a split named as a formula", RUN, STEP, evaluation(1, 0.5, "$\\frac{$")),
            ("an end without scores", RUN, STEP, {"kind": "end"}),
        )
    ),
    *(
        Case("report", f"plot {name}", a_refused_log(*lines, raw=raw), named)
        for name, lines, raw, named in (
            ("a log without a step", (RUN,), b"", "nothing to draw"),
            ("a damaged line", (RUN,), b"{{{\n{}\n", "log.jsonl:2"),
            ("a binary log", (), b"\xff\xfe\0\n\xff\n", "log.jsonl:1"),
            ("a log of nested lists", (RUN,), b"[" * 5000 + b"\n\n", "log.jsonl:2"),
        )
    ),
    Case("report", "plot thirty runs", thirty_runs, None),
]


def refused_list(folder: Path, content: bytes) -> None:
    checkpoint(folder)
    refused("predict", "--checkpoint", folder / "run", "-", stdin=content)
