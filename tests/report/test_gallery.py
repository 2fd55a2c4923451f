"""`ffvt visualize`: the page and the figure show what the model picked, and text stays text."""

import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ffvt
from ffvt.cli import main
from ffvt.data.images import PAD_COLOUR
from ffvt.report.gallery import Shown, look_at, selection_figure, true_class
from ffvt.report.gallery_page import Gallery, _layer_rules, render
from tests.helpers import write_checkpoint

CLASSES = ("crow", "blue jay", "kite")
ODD = ("<script>alert(1)</script>", '$x^2$ & "b"', "\x1b[31mred", "🥑 avocado")


class Structure(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style") and data.strip():
            self.texts.append(data.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and five photographs, two of them of a known class."""
    root = tmp_path_factory.mktemp("gallery")
    write_checkpoint(root / "run", CLASSES)
    for name in ("crow/1.jpg", "kite/deep/2.png", "3.png", "4.webp", "5.png"):
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((120, 80), 80).convert("RGB").save(root / "photos" / name)
    return root


def visualize(run, *arguments):
    return main(["visualize", "--checkpoint", str(run / "run"), "--workers", "0", *map(str, arguments)])


@pytest.fixture(scope="module")
def page(run):
    assert visualize(run, run / "photos", "--output", run / "page.html") == 0
    return (run / "page.html").read_text()


def test_the_page_has_a_card_with_name_class_probability_and_alt_text_for_every_image(run, page):
    structure = Structure(page)
    cards = structure.of("article")
    assert len(cards) == 5
    classifier = ffvt.load(run / "run")
    for card, name in zip(cards, ("3.png", "4.webp", "5.png", "crow/1.jpg", "kite/deep/2.png")):
        found, probability = classifier(run / "photos" / name, top=1)[0]
        assert card["data-class"] == found
        assert float(card["data-probability"]) == pytest.approx(probability, abs=1e-4)
        assert str(run / "photos" / name).lower() in card["data-text"]
        assert f'alt="{Path(name).name}: {found}, {probability:.1%}' in page
    assert [card["data-correct"] for card in cards[:3]] == [""] * 3
    assert {card["data-correct"] for card in cards[3:]} <= {"0", "1"}


def test_the_page_is_one_file_that_asks_for_nothing(page):
    structure = Structure(page)
    for _, attributes in structure.tags:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not structure.of("link")
    assert "@import" not in page
    assert "url(" not in page
    (policy,) = [meta["content"] for meta in structure.of("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in structure.of("meta")
    assert "prefers-color-scheme: dark" in page


def test_the_page_says_why_a_model_of_four_layers_shows_three(page):
    text = " ".join(Structure(page).texts)
    assert "each of the first 3 picks 3 tokens" in text
    assert "a model of 4 layers shows 3" in text
    assert {tag["value"] for tag in Structure(page).of("input") if tag.get("name") == "show"} == {
        *("heat", "all", "none", "l1", "l2", "l3")
    }


def squares(path):
    return [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)]


def test_every_layers_picks_are_drawn_where_the_model_saw_them(run, page):
    classifier = ffvt.load(run / "run")
    _, selection = classifier.model.forward_with_selection(classifier.transform(run / "photos" / "3.png")[None])
    card = page.split("<article")[1]
    groups = re.findall(r'<g class="layer l\d"><path class="veil" d="[^"]*"/><path class="pick" d="([^"]*)"', card)
    for picks, path in zip(selection.index[0].tolist(), groups):
        assert sorted(squares(path)) == sorted(((p - 1) % 4, (p - 1) // 4) for p in picks if p)
    levels = re.findall(r'fill-opacity="[\d.]+" d="([^"]*)"', card)
    often = {}
    for pick in selection.index[0].flatten().tolist():
        often[pick] = often.get(pick, 0) + 1
    assert sum(len(squares(path)) for path in levels) == len(set(often) - {0})
    assert len(levels) == len({count for pick, count in often.items() if pick})
    # 64 of 72 pixels are seen: of 120 x 80, from 6.67 and 4.44 on
    assert "matrix(26.667 0 0 17.778 6.6667 4.4444)" in card


def test_text_of_files_and_classes_stays_text(tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", ODD))
    gallery = Gallery(classifier, "<i>run</i>")
    for name in ODD:
        found = [(other, 0.25) for other in (name, *ODD)]
        picture = Image.new("RGB", (8, 8))
        index = torch.tensor([[0, 1], [2, 3], [4, 5]])
        gallery.add(Shown('"><img src=x onerror=alert(1)>', picture, (0, 0, 1, 1), found, "</article>", index))
    gallery.problems.append(("<b>bad</b>", "<script>"))
    page = render(gallery)
    structure = Structure(page)
    assert len(structure.of("script")) == 1
    assert len(structure.of("article")) == 4
    assert all(image["src"].startswith("data:") for image in structure.of("img"))
    assert "<b>bad" not in page
    assert "\x1b" not in page
    assert "🥑 avocado" in page
    assert '$x^2$ & "b"' in structure.texts
    assert any("Layer 1 picks the class token" in text for text in structure.texts)


def test_a_bad_file_is_named_on_the_page_and_by_the_exit_status(run, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    output = tmp_path / "page.html"
    assert visualize(run, tmp_path / "bad.jpg", run / "photos" / "3.png", "--output", output) == 1
    assert "bad.jpg" in capsys.readouterr().err
    assert "1 file could not be read" in output.read_text()
    assert visualize(run, tmp_path / "bad.jpg", "--output", output) == 1
    assert "an image must be readable; got none" in capsys.readouterr().err


def test_pictures_keep_their_resolution_up_to_a_bound(run, tmp_path):
    Image.new("RGB", (3000, 100)).save(tmp_path / "wide.png")
    classifier = ffvt.load(run / "run")
    (wide,) = look_at(classifier, [tmp_path / "wide.png"], max_size=1024, threads=0)
    assert wide.picture.size == (1024, 34)
    (small,) = look_at(classifier, [run / "photos" / "3.png"], threads=2)
    assert small.picture.size == (120, 80)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("crow/1.jpg", "crow"), ("x/kite/deep/1.jpg", "kite"), ("crow/kite/1.jpg", "kite"), ("crow.jpg", None)],
)
def test_the_true_class_is_the_nearest_folder_that_is_one(path, expected):
    assert true_class(Path(path), CLASSES) == expected


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_has_names_and_probabilities_in_the_format_of_its_name(run, tmp_path, suffix, capsys):
    output = tmp_path / f"picks.{suffix}"
    assert visualize(run, run / "photos" / "3.png", "--output", output) == 0
    assert output.read_bytes()[:5] in (b"\x89PNG\r", b"%PDF-", b"<?xml")
    assert capsys.readouterr().out.strip() == str(output)


def test_images_are_looked_at_only_as_far_ahead_as_they_are_needed(run):
    classifier, drawn = ffvt.load(run / "run", batch_size=1), itertools.count()
    looked = look_at(classifier, (run / "photos" / "3.png" for _ in itertools.islice(drawn, 300)), threads=2)
    next(looked)
    looked.close()
    assert next(drawn) < 20


def test_what_is_no_patch_is_told_as_that_where_there_are_registers(run):
    classifier = SimpleNamespace(classes=CLASSES, model=SimpleNamespace(config=SimpleNamespace()))
    classifier.model.config = SimpleNamespace(
        grid_size=4, image_size=64, num_prefix_tokens=5, first_candidate=0, num_select=2
    )
    found = Shown("1.png", Image.new("RGB", (8, 8)), (0, 0, 1, 1), [("crow", 0.5)], None, torch.tensor([[0, 1]]))
    gallery = Gallery(classifier, "run")
    gallery.add(found)
    text = " ".join(Structure(render(gallery)).texts)
    assert "Layer 1 picks what is no patch, too." in text
    assert "class token and registers among them" in text
    assert selection_figure(classifier, [found]).axes[1].get_title() == "layer 1 + no patch"


def test_what_is_padded_is_grey_in_a_figure(run):
    classifier = ffvt.load(run / "run")
    found = Shown(
        "1.png", Image.new("RGB", (8, 4)), (0, -0.5, 1, 1.5), [("crow", 0.5)], None, torch.ones(3, 2, dtype=torch.int64)
    )
    shown = selection_figure(classifier, [found]).axes[0].images[0].get_array()
    assert tuple(shown[0, 0]) == PAD_COLOUR
    assert tuple(shown[160, 160]) == (0, 0, 0)


def test_the_captions_of_a_figure_name_file_class_and_truth(run):
    classifier = ffvt.load(run / "run")
    shown = list(look_at(classifier, [run / "photos" / "crow" / "1.jpg", run / "photos" / "3.png"], threads=0))
    figure = selection_figure(classifier, shown)
    rows = [figure.axes[0], figure.axes[4]]
    for one, axes in zip(shown, rows):
        lines = axes.get_title().split("\n")
        assert lines[:2] == [Path(one.name).name, f"{one.found[0][0]} {one.found[0][1]:.1%}"]
        assert len(lines) == (3 if one.correct is False else 2)
    assert rows[0].images[0].get_array().shape == (320, 320, 3)


def test_a_class_name_with_dollars_is_drawn_as_it_is(tmp_path, run):
    write_checkpoint(tmp_path / "run", ("$\\frac{$", "$$", "a$b"))
    assert visualize(tmp_path, run / "photos" / "3.png", "--output", tmp_path / "a.png") == 0


def test_what_cannot_work_is_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("not ours")
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "vit", model={"feature_fusion": False})
    photos = run / "photos"
    for folder, arguments, message in (
        (run, [photos, "--output", tmp_path / "x.doc"], "x.doc"),
        (run, [photos, "--output", tmp_path / "mine.html"], "a page or new, other files stay"),
        (run, [photos, "--output", tmp_path / "missing" / "x.html"], "folder of output must exist"),
        (run, [photos, "--max_size", "3"], "got max_size=3"),
        (run, [], "images must be given"),
        (run, [photos / "3.png"] * 41 + ["--output", tmp_path / "x.png"], "at most 40"),
        (tmp_path / "plain", [photos], "training.json"),
    ):
        assert visualize(folder, *arguments) == 1
        err = capsys.readouterr().err.strip()
        assert message in err
        assert "\n" not in err
    assert main(["visualize", "--checkpoint", str(tmp_path / "vit"), str(photos)]) == 1
    assert "feature_fusion=True" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "not ours"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, without a network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or started.chromium.executable_path
        if not Path(program).exists():
            pytest.skip("no Chromium is installed")
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, run, page):
    """The page at 390 pixels, and what it said and asked for."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((run / "page.html").as_uri())
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1
    context.close()


def visible(tab):
    return tab.eval_on_selector_all(
        "article", "cards => cards.filter((card) => card.offsetHeight).map((card) => card.dataset.text)"
    )


@pytest.mark.slow
def test_in_a_browser_the_search_finds_files_and_classes(opened):
    assert len(visible(opened)) == 5
    opened.keyboard.press("/")
    opened.keyboard.type("crow 1.jpg")
    assert len(visible(opened)) == 1
    assert opened.inner_text("#count") == "1 of 5"
    opened.keyboard.press("Escape")
    assert len(visible(opened)) == 5
    opened.keyboard.type("no such file")
    assert visible(opened) == []
    opened.click("#nothing button")
    assert len(visible(opened)) == 5


@pytest.mark.slow
def test_in_a_browser_right_and_wrong_are_told_apart_and_ordered(opened):
    right, wrong = (len(opened.query_selector_all(f"article[data-correct='{flag}']")) for flag in "10")
    for flag, count in (("1", right), ("0", wrong), ("", 5)):
        opened.check(f"input[name=correct][value='{flag}']", force=True)
        assert len(visible(opened)) == count
    opened.select_option("#sort", "rising")
    shares = opened.eval_on_selector_all("article", "cards => cards.map((card) => +card.dataset.probability)")
    assert shares == sorted(shares)


def shown_groups(tab, within):
    return tab.eval_on_selector(
        f"{within} svg",
        "svg => [...svg.querySelectorAll('g[class]')].filter((g) => getComputedStyle(g).display !== 'none')"
        ".map((g) => g.getAttribute('class'))",
    )


@pytest.mark.slow
def test_in_a_browser_the_layers_are_toggled(opened):
    assert shown_groups(opened, "article") == ["heat"]
    opened.check("input[name=show][value=l2]", force=True)
    assert shown_groups(opened, "article") == ["layer l2"]
    opened.check("input[name=show][value=all]", force=True)
    assert shown_groups(opened, "article") == ["layer l1", "layer l2", "layer l3"]
    opened.check("input[name=show][value=none]", force=True)
    assert shown_groups(opened, "article") == []


@pytest.mark.slow
def test_in_a_browser_the_keyboard_does_everything(opened):
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate("document.activeElement.closest('article').dataset.number") == "1"
    opened.keyboard.press("Enter")
    assert opened.is_visible("#detail")
    assert opened.inner_text("#place") == "2 of 5"
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#place") == "3 of 5"
    for _ in range(3):
        opened.keyboard.press("ArrowDown")  # heat, all, 1, 2
    assert shown_groups(opened, "#large") == ["layer l2"]
    assert opened.inner_text("#strip [aria-pressed=true]").strip() == "Layer 2"
    opened.keyboard.press("Escape")
    # A dialog tells that it is closed a moment later.
    opened.wait_for_function("document.activeElement.closest('article')?.dataset.number === '2'", timeout=5000)
    assert not opened.is_visible("#detail")


@pytest.mark.slow
def test_in_a_browser_nothing_is_wider_than_the_screen_and_pictures_are_drawn(opened):
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    sizes = opened.eval_on_selector_all("article img", "images => images.map((image) => image.naturalWidth)")
    assert sizes == [120] * 5
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark))) < 60


def test_every_layer_of_a_deep_model_has_a_colour_of_its_own():
    assert len(set(re.findall(r"--layer:([^}]*)", _layer_rules(31)))) == 31
