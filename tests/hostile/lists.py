"""Lists of images: of another encoding, of huge numbers, of the wrong kind, that lead outside or never end."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat

from ffvt.data.layouts import read_listing
from tests.data import layout_fixtures as fixtures
from tests.hostile.archives import bounded_memory
from tests.hostile.case import Case

CUB_LISTS = {"classes", "images", "image_class_labels", "train_test_split", "bounding_boxes"}
WIDE = "é" * 200_000  # in latin-1 one bad byte after the other


def damaged(
    name: str, dataset: str, file: str, change: Callable[[Path], object], named: str, split: str = "train"
) -> Case:
    """A small data set of which one file is changed; reading it must name what is wrong, in bounded memory."""

    def attempt(folder: Path) -> None:
        fixtures.LAYOUT_WRITERS[dataset](folder)
        change(folder / file)
        with bounded_memory():
            read_listing(dataset, split, folder)

    return Case("lists", f"{dataset}: {name}", attempt, named, seconds=10)


def csv(name: str, text: str | bytes, named: str | None, split: str = "train", **more: object) -> Case:
    """A list train.csv beside two images; where `named` is None it must give the two."""

    def attempt(folder: Path) -> None:
        write_images(folder / "set")
        content = text.encode() if isinstance(text, str) else text
        (folder / "set" / "train.csv").write_bytes(content.replace(b"ROOT", bytes(folder)))
        options = {key: str(value).replace("ROOT", str(folder)) for key, value in more.items()}
        listing = read_listing("csv", split, folder / "set", **options)
        assert list(listing.classes) == ["ant", "bee"], listing.classes
        assert [path.name for path in listing.paths] == ["0.png", "1.png"], listing.paths

    return Case("lists", f"csv: {name}", attempt, named, seconds=10)


def write_images(root: Path) -> None:
    for number in range(2):
        fixtures.picture(root / f"{number}.png", number)
        fixtures.picture(root.parent / "elsewhere" / f"{number}.png", number)


def replace(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text, path
        path.write_text(text.replace(old, new, 1))

    return change


def text(content: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return lambda path: path.write_text(content, encoding=encoding)


def append(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes() + content)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link_to(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def dog_list(labels: object, files: int = 6) -> Callable[[Path], None]:
    """A list of Stanford Dogs with these labels."""

    def change(path: Path) -> None:
        cells = np.empty((files, 1), object)
        cells[:, 0] = [
            f"n0208562{i // 2}-Breed_{i // 2}/n0208562{i // 2}_{3 * (i // 2) + i % 2 + 1}.jpg" for i in range(files)
        ]
        savemat(path, {"file_list": cells, "labels": np.array(labels)[:, None]})

    return change


def large_array(path: Path) -> None:
    savemat(
        path,
        {"labels": np.zeros((1, 12_000_000), np.uint8), "file_list": np.array([["a"]], object)},
        do_compression=True,
    )


def edited_json(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = json.loads(path.read_text())
        edit(found)
        path.write_text(json.dumps(found))

    return change


def mutants(dataset: str, file: str) -> Case:
    """Changed copies of one list: each is read, or refused in one bounded line."""

    def attempt(folder: Path) -> None:
        draw = random.Random(file)
        root = fixtures.LAYOUT_WRITERS[dataset](folder)
        path = root / file
        content = path.read_bytes()
        for _ in range(20 if file.endswith(".mat") else 200):
            mutant = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                mutant[draw.randrange(len(mutant))] = draw.randrange(256)
            if draw.random() < 0.2:
                del mutant[draw.randrange(len(mutant)) :]
            path.write_bytes(mutant)
            message = _refusal(dataset, root)
            assert len(message) < 1000, message
            assert not message or message.isprintable(), message

    return Case("lists", f"{dataset}: mutants of {Path(file).name}", attempt, None, slow=True)


def _refusal(dataset: str, root: Path) -> str:
    try:
        read_listing(dataset, "train", root)
    except ValueError as error:
        return str(error)
    return ""


def many_rows(folder: Path) -> None:
    """A hundred thousand rows that all lack a label: one bounded line, at once."""
    (folder / "train.csv").write_text("image,label\n" + "a.png,\n" * 100_000)
    read_listing("csv", "train", folder)


CUB = "CUB_200_2011"
LABELS = f"{CUB}/image_class_labels.txt"
TRAIN_JSON = "train2017.json"
HEAD = "image,label\n"
BOTH = "0.png,ant\n1.png,bee\n"

CASES = [
    *(
        damaged(
            f"{name}.txt in latin-1",
            "CUB",
            f"{CUB}/{name}.txt",
            append(WIDE.encode("latin-1")),
            f"{name}.txt must be UTF-8",
        )
        for name in sorted(CUB_LISTS)
    ),
    *(damaged(f"{name}.txt a pipe", "CUB", f"{CUB}/{name}.txt", as_pipe, f"{name}.txt") for name in sorted(CUB_LISTS)),
    damaged("images.txt a folder", "CUB", f"{CUB}/images.txt", as_folder, "images.txt"),
    damaged(
        "images.txt a link to zeros without end", "CUB", f"{CUB}/images.txt", as_link_to("/dev/zero"), "images.txt"
    ),
    damaged("images.txt a link to itself", "CUB", f"{CUB}/images.txt", as_link_to("images.txt"), "images.txt"),
    damaged("images.txt in UTF-16", "CUB", f"{CUB}/images.txt", text("1 a.jpg\n", "utf-16"), "images.txt"),
    damaged("images.txt empty", "CUB", f"{CUB}/images.txt", text(""), "train must have images"),
    damaged(
        "images.txt of zeros",
        "CUB",
        f"{CUB}/images.txt",
        lambda path: path.write_bytes(bytes(1 << 20)),
        "train_test_split.txt",
    ),
    damaged("one line of 5 MB", "CUB", f"{CUB}/images.txt", text("1 " + "a" * 5_000_000), "every listed image"),
    damaged(
        "name with a zero byte", "CUB", f"{CUB}/images.txt", replace("Bird_0001.jpg", "Bird\0.jpg"), "Bird\\x00.jpg"
    ),
    damaged(
        "name with escape codes", "CUB", f"{CUB}/images.txt", replace("Bird_0001.jpg", "\x1b[2J.jpg"), "\\x1b[2J.jpg"
    ),
    damaged("name of a pipe", "CUB", f"{CUB}/images/001.Bird_0/Bird_0001.jpg", as_pipe, "Bird_0001.jpg"),
    damaged("name of a folder", "CUB", f"{CUB}/images/001.Bird_0/Bird_0001.jpg", as_folder, "Bird_0001.jpg"),
    damaged(
        "absolute name",
        "CUB",
        f"{CUB}/images.txt",
        replace("001.Bird_0/Bird_0001.jpg", "/etc/hostname"),
        "/etc/hostname",
    ),
    damaged(
        "name that leads outside", "CUB", f"{CUB}/images.txt", replace("001.Bird_0/", "../../../"), "images must lie in"
    ),
    *(
        damaged(f"label {label[:20]!r}", "CUB", LABELS, replace("4 2\n", f"4 {label}\n"), "image_class_labels.txt")
        for label in ("two", "-1", "1.5", "1e9", "٣", "²", "9" * 5000, "", "0x1")
    ),
    damaged("label 0", "CUB", LABELS, replace("4 2\n", "4 0\n"), "got -1"),
    damaged("label 10^9", "CUB", LABELS, replace("4 2\n", "4 1000000000\n"), "got 999999999"),
    damaged("image without a label", "CUB", LABELS, replace("4 2\n", ""), "no '4'"),
    damaged("image of no half", "CUB", f"{CUB}/train_test_split.txt", replace("4 1\n", ""), "no '4'"),
    *(
        damaged(
            f"box of {what}",
            "CUB",
            f"{CUB}/bounding_boxes.txt",
            replace("10.0 5.0 20.0 30.0", box),
            "bounding_boxes.txt",
        )
        for what, box in (("three numbers", "1 2 3"), ("words", "a b c d"), ("nan", "nan 1 2 3"), ("inf", "1 2 inf 3"))
    ),
    damaged(
        "node of no number", "nabirds", "nabirds/image_class_labels.txt", replace(" 1010\n", " bird\n"), "got 'bird'"
    ),
    damaged("node without a name", "nabirds", "nabirds/classes.txt", replace("1010 ", "1011 "), "no '1010'"),
    # Cotton80, SoyLocal
    *(
        damaged(f"class {label[:20]!r}", "cotton", "anno/train.txt", replace("png 1\n", f"png {label}\n"), "train.txt")
        for label in ("1000000000", "9" * 30, "one", "-3", "1.0", "٣")
    ),
    damaged("line without a class", "cotton", "anno/train.txt", append(b"lonely\n"), "got 'lonely'"),
    damaged("empty list", "cotton", "anno/train.txt", text(""), "train must have images"),
    damaged("latin-1", "cotton", "anno/train.txt", append("caf\xe9.png 1".encode("latin-1")), "byte 0xe9 in line 7"),
    damaged("test list a pipe", "cotton", "anno/test.txt", as_pipe, "test.txt", "test"),
    damaged("train list a pipe, for test", "cotton", "anno/train.txt", as_pipe, "train.txt", "test"),
    damaged(
        "name with two dots", "cotton", "anno/train.txt", replace("leaf 1.png", "../../1.png"), "images must lie in"
    ),
    # MATLAB files
    damaged("no MATLAB file", "dog", "train_list.mat", text("text"), "train_list.mat"),
    damaged("empty file", "dog", "train_list.mat", text(""), "train_list.mat"),
    damaged("pipe", "dog", "train_list.mat", as_pipe, "train_list.mat"),
    damaged("cut", "dog", "train_list.mat", lambda path: path.write_bytes(path.read_bytes()[:300]), "train_list.mat"),
    damaged(
        "pickle", "dog", "train_list.mat", lambda path: path.write_bytes(b"\x80\x04cposix\nsystem\n."), "train_list.mat"
    ),
    damaged(
        "of version 7.3",
        "dog",
        "train_list.mat",
        lambda path: path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM" + bytes(400)),
        "train_list.mat",
    ),
    damaged("label 10^9", "dog", "train_list.mat", dog_list([1, 1, 2, 2, 3, 10**9]), "got class 1000000000"),
    damaged("labels of nan", "dog", "train_list.mat", dog_list([1, 1, 2, 2, 3, np.nan]), "dog: the lists"),
    damaged("labels of inf", "dog", "train_list.mat", dog_list([1, 1, 2, 2, 3, np.inf]), "dog: the lists"),
    damaged("negative label", "dog", "train_list.mat", dog_list([1, 1, 2, 2, 3, -7]), "got -8"),
    damaged("fewer labels than files", "dog", "train_list.mat", dog_list([1, 1, 2]), "one length"),
    damaged("array of 12 million", "dog", "train_list.mat", large_array, "at most 10000000 entries in labels"),
    damaged("other variables", "dog", "train_list.mat", lambda path: savemat(path, {"x": 1}), "must hold file_list"),
    damaged(
        "no structure",
        "car",
        "stanford_cars/devkit/cars_train_annos.mat",
        lambda path: savemat(path, {"annotations": np.ones(3)}),
        "car: the lists",
    ),
    damaged(
        "names that are numbers",
        "car",
        "stanford_cars/devkit/cars_meta.mat",
        lambda path: savemat(path, {"class_names": np.ones(1)}),
        "got 1",
    ),
    damaged("list a pipe", "car", "stanford_cars/devkit/cars_train_annos.mat", as_pipe, "cars_train_annos.mat"),
    *(
        damaged(f"{name} a pipe", "air", f"fgvc-aircraft-2013b/data/{name}.txt", as_pipe, f"{name}.txt")
        for name in ("variants", "images_variant_trainval", "images_box")
    ),
    damaged(
        "list in latin-1",
        "air",
        "fgvc-aircraft-2013b/data/variants.txt",
        append(WIDE.encode("latin-1")),
        "variants.txt",
    ),
    damaged(
        "unknown variant",
        "air",
        "fgvc-aircraft-2013b/data/images_variant_trainval.txt",
        replace("707-200", "A" * 100_000),
        "air: the lists",
    ),
    # JSON
    damaged("one bad byte in 5 MB", "inat2017", TRAIN_JSON, append(b" " * 5_000_000 + b"\xff"), "byte 0xff in line 1"),
    damaged("cut", "inat2017", TRAIN_JSON, lambda path: path.write_bytes(path.read_bytes()[:-30]), "must be JSON"),
    damaged("100,000 brackets", "inat2017", TRAIN_JSON, text("[" * 100_000), "inat2017: the lists"),
    damaged("number of 10,000 digits", "inat2017", TRAIN_JSON, text("9" * 10_000), "inat2017: the lists"),
    damaged("list", "inat2017", TRAIN_JSON, text("[]"), "inat2017: the lists"),
    damaged("null", "inat2017", TRAIN_JSON, text("null"), "inat2017: the lists"),
    damaged("pipe", "inat2017", TRAIN_JSON, as_pipe, TRAIN_JSON),
    damaged(
        "no annotations", "inat2017", TRAIN_JSON, edited_json(lambda found: found.pop("annotations")), "annotations"
    ),
    damaged(
        "category without an annotation",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["categories"].pop()),
        "KeyError",
    ),
    damaged(
        "class name a table",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["categories"][0].update(name={"a": 1})),
        "must have a name",
    ),
    damaged(
        "class name null",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["categories"][0].update(name=None)),
        "got None",
    ),
    damaged(
        "ids of two types",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["categories"][0].update(id="x")),
        "inat2017: the lists",
    ),
    damaged(
        "file a number",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["images"][0].update(file_name=5)),
        "inat2017: the lists",
    ),
    damaged(
        "file that leads outside",
        "inat2017",
        TRAIN_JSON,
        edited_json(lambda found: found["images"][0].update(file_name="../x.jpg")),
        "x.jpg",
    ),
    # a user's own list
    csv("as it should be", HEAD + BOTH, None),
    csv("semicolons", "image;label\n0.png;ant\n1.png;bee\n", None),
    csv("tabs", "image\tlabel\n0.png\tant\n1.png\tbee\n", None),
    csv("filename and class", "filename,class\n" + BOTH, None),
    csv("Path and Target, the other way round", "Target,Path\nant,0.png\nbee,1.png\n", None),
    csv("more columns", "id,image,split,label\n1,0.png,x,ant\n2,1.png,x,bee\n", None),
    csv("lines ended as on Windows, byte order mark", "\ufeff" + (HEAD + BOTH).replace("\n", "\r\n"), None),
    csv("blanks around the values", "image , label\n0.png , ant\n1.png, bee \n", None),
    csv("quotes", 'image,label\n"0.png","ant"\n"1.png","bee"\n', None),
    csv("absolute names in the folder", HEAD + "ROOT/set/0.png,ant\nROOT/set/1.png,bee\n", None),
    csv("image_root", HEAD + BOTH, None, image_root="ROOT/elsewhere"),
    csv(
        "absolute names in image_root",
        HEAD + "ROOT/elsewhere/0.png,ant\nROOT/elsewhere/1.png,bee\n",
        None,
        image_root="ROOT/elsewhere",
    ),
    csv("absolute names elsewhere", HEAD + "ROOT/elsewhere/0.png,ant\nROOT/set/1.png,bee\n", "image_root"),
    csv(
        "names outside of image_root",
        HEAD + "../set/0.png,ant\n1.png,bee\n",
        "images must lie in",
        image_root="ROOT/elsewhere",
    ),
    csv("image_root of nothing", HEAD + BOTH, "nowhere", image_root="ROOT/nowhere"),
    csv(
        "name of another folder of the same beginning", HEAD + "../set-two/0.png,ant\n1.png,bee\n", "images must lie in"
    ),
    csv("name that leads outside", HEAD + "../../etc/hostname,ant\n1.png,bee\n", "images must lie in"),
    csv("label of blanks", HEAD + "0.png, \n1.png,bee\n", "line 2"),
    csv("no label", HEAD + "0.png\n1.png,bee\n", "line 2"),
    csv("no image", HEAD + ",ant\n1.png,bee\n", "line 2"),
    csv("no header", BOTH, "must have the columns"),
    csv("another header", "picture,species\n" + BOTH, "got picture, species"),
    csv("empty", "", "got an empty file"),
    csv("header only", HEAD, "train must have images"),
    csv("header of 1 MB", "a" * 1_000_000 + "\n", "train.csv must be a list with columns"),
    csv("field of 1 MB", HEAD + "0.png," + "a" * 1_000_000 + "\n", "train.csv must be a list with columns"),
    csv("quote that never ends", HEAD + '0.png,"ant\n1.png,bee\n', "train.csv"),
    csv("latin-1", HEAD.encode() + "0.png,caf\xe9\n".encode("latin-1"), "byte 0xe9 in line 2"),
    csv("latin-1, 1 MB of it", HEAD.encode() + ("é" * 1_000_000).encode("latin-1"), "byte 0xe9 in line 2"),
    csv("UTF-16", (HEAD + BOTH).encode("utf-16"), "must be UTF-8"),
    csv("image file in its place", b"\x89PNG\r\n\x1a\n" + bytes(100), "must be UTF-8"),
    csv("zero byte in a name", HEAD + "0\0.png,ant\n1.png,bee\n", "0\\x00.png"),
    csv("name with escape codes", HEAD + "\x1b[2J.png,ant\n1.png,bee\n", "\\x1b[2J.png"),
    csv("folder as an image", HEAD + ".,ant\n1.png,bee\n", "images must lie in"),
    csv("list as an image", HEAD + "gone.png,ant\n1.png,bee\n", "gone.png"),
    csv("unknown split", HEAD + BOTH, "holdout.csv", split="holdout"),
    Case("lists", "csv: a hundred thousand rows without a label", many_rows, "100000 such", seconds=10),
    Case(
        "lists",
        "csv: pipe",
        lambda folder: os.mkfifo(folder / "train.csv") or read_listing("csv", "train", folder),
        "train.csv",
        seconds=5,
    ),
    Case(
        "lists",
        "csv: folder",
        lambda folder: (folder / "train.csv").mkdir() or read_listing("csv", "train", folder),
        "train.csv",
    ),
    Case(
        "lists",
        "image_root for folders",
        lambda folder: read_listing("imagefolder", "train", folder, image_root="x"),
        "image_root",
    ),
    *(
        mutants(dataset, file)
        for dataset, file in (
            ("CUB", LABELS),
            ("CUB", f"{CUB}/images.txt"),
            ("cotton", "anno/train.txt"),
            ("dog", "train_list.mat"),
            ("car", "stanford_cars/devkit/cars_train_annos.mat"),
            ("inat2017", TRAIN_JSON),
            ("csv", "train.csv"),
        )
    ),
]
