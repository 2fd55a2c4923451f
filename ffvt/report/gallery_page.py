"""The HTML of `ffvt visualize`: one file without links, which works without scripts, and better with them."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ffvt.errors import printable
from ffvt.report.picks import PatchGrid, noun, patch_grid, picks_by_head, reason
from ffvt.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from ffvt.inference import Classifier
    from ffvt.report.gallery import Shown

QUALITY = 85  # of the JPEGs
# Outlines of the first layer to the last: from cold to warm, legible on photographs
LAYER_COLOURS = ((56, 189, 248), (129, 140, 248), (217, 70, 239), (244, 63, 94), (251, 146, 60), (250, 204, 21))
HEAT_COLOURS = ((254, 240, 138), (251, 191, 36), (249, 115, 22), (220, 38, 38), (159, 18, 57))  # of few picks to many


@dataclass
class Gallery:
    """The cards of a page, one an image, added as they are made.

    Attributes:
        classifier: the model.
        checkpoint: where it came from.
        layers: how many pick, or how many heads.
        cards: the HTML of each image.
        known, right: images whose class is known, and those of them that are predicted as it.
        problems: (name, problem) of the files that could not be read.
    """

    classifier: Classifier
    checkpoint: str
    layers: int = 0
    cards: list[str] = field(default_factory=list)
    known: int = 0
    right: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, shown: Shown) -> None:
        """One more image."""
        self.layers = len(shown.index)
        self.known += shown.correct is not None
        self.right += shown.correct is True
        config = self.classifier.model.config
        is_alone = config.num_prefix_tokens == 1 and config.keep_rate == 1
        other = "the class token too, which is no patch" if is_alone else "what is no patch, too"
        self.cards.append(_card(shown, len(self.cards), patch_grid(config), noun(config), other))

    @property
    def noun(self) -> str:
        """What picks: a layer or a head."""
        return noun(self.classifier.model.config)


def render(gallery: Gallery) -> str:
    """The page."""
    resources = files("ffvt.report")
    script = resources.joinpath("gallery.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = resources.joinpath("gallery.css").read_text(encoding="utf-8") + _layer_rules(gallery.layers)
    # Nothing may be fetched, and no other script may run, whatever a file or a class is called
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"Selected patches · {printable(PurePath(gallery.checkpoint).name or gallery.checkpoint, 60)}"
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>",
            _header(gallery),
            _toolbar(gallery),
            f'<main id="cards">{"".join(gallery.cards)}</main>',
            '<p id="nothing" hidden>No image matches. <button type="button">Show all</button></p>',
            _problems(gallery.problems),
            _footer(gallery),
            _dialog(),
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _header(gallery: Gallery) -> str:
    config = gallery.classifier.model.config
    facts = [f"{_count(len(gallery.cards), 'image')}", _count(len(gallery.classifier.classes), "class", "classes")]
    if gallery.known:
        facts.append(f"{gallery.right / gallery.known:.1%} of {gallery.known} with a known class are right")
    is_alone = config.num_prefix_tokens == 1 and config.keep_rate == 1
    if config.first_candidate:
        picked = "none of which is the class token" if is_alone else "all of which are patches"
    else:
        picked = "the class token being one more candidate" if is_alone else "class token and registers among them"
    return (
        f"<header><h1>What each {gallery.noun} picks</h1>"
        f'<p class="facts">{" · ".join(map(escape, facts))}</p>'
        f"<details><summary>How to read this</summary><p>The model cuts what it sees of an image into "
        f"{config.grid_size} × {config.grid_size} patches{_overlapping(config)}. {_who_picks(gallery, picked)} What "
        "lies outside of the dashed frame is cropped off before the model sees it.</p></details></header>"
    )


def _overlapping(config: Any) -> str:
    return " that overlap" if getattr(config, "patch_stride", None) else ""


def _who_picks(gallery: Gallery, picked: str) -> str:
    config, lines = gallery.classifier.model.config, gallery.layers
    if picks_by_head(config):
        return (
            f"Before the last layer each of the {lines} heads picks one patch, its part, by {reason(config)}. The last "
            "layer gets the class token with these parts, and classifies."
        )
    return (
        f"It has {lines + 1} layers: each of the first {lines} picks {config.num_select} tokens by {reason(config)}, "
        f"{picked}. The last layer picks none: it gets the class token with all these picks, and classifies. So a "
        f"model of {lines + 1} layers shows {lines}."
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _toolbar(gallery: Gallery) -> str:
    shows = [("heat", "Heat map"), ("all", "All"), *((f"l{n}", str(n)) for n in range(1, gallery.layers + 1))]
    chips = "".join(_chip("show", value, text, value == "heat") for value, text in [*shows, ("none", "Off")])
    wrong = gallery.known - gallery.right
    counts = [("", f"All {len(gallery.cards)}"), ("1", f"Right {gallery.right}"), ("0", f"Wrong {wrong}")]
    filters = "".join(_chip("correct", value, text, value == "") for value, text in counts)
    right = f'<fieldset class="chips"><legend>Predictions</legend>{filters}</fieldset>' if gallery.known else ""
    orders = [("order", "as given"), ("rising", "least certain"), ("falling", "most certain"), ("class", "class")]
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in orders)
    return (
        '<form id="tools" role="search"><div class="row">'
        '<label class="search"><span class="quiet">Search</span><input type="search" id="search" autocomplete="off" '
        'spellcheck="false" placeholder="File or class" aria-keyshortcuts="/"><kbd>/</kbd></label>'
        f'{right}<label class="sort"><span>Order</span><select id="sort">{options}</select></label>'
        '<output id="count" aria-live="polite"></output></div>'
        f'<div class="row"><span class="name" aria-hidden="true">Picks of {gallery.noun}</span>'
        f'<fieldset class="chips" data-noun="{gallery.noun.capitalize()}">'
        f"<legend>Picks of {gallery.noun}</legend>{chips}</fieldset>"
        f"{_legend(gallery.layers, gallery.noun)}</div></form>"
    )


def _chip(name: str, value: str, text: str, checked: bool) -> str:
    state = " checked" if checked else ""
    return f'<label><input type="radio" name="{name}" value="{value}"{state}><span>{escape(text)}</span></label>'


def _legend(layers: int, noun: str) -> str:
    heat, outlines = (f"linear-gradient(90deg, {', '.join(map(_rgb, c))})" for c in (HEAT_COLOURS, LAYER_COLOURS))
    return (
        f'<p class="legend" data-for="heat">picked by 1 <i style="background:{heat}"></i> {layers} {noun}s</p>'
        f'<p class="legend" data-for="all">{noun} 1 <i style="background:{outlines}"></i> {layers}</p>'
    )


def _card(shown: Shown, number: int, patches: PatchGrid, noun: str, other: str) -> str:
    name, probability = shown.found[0]
    name, path = printable(name), PurePath(shown.name)
    true = "" if shown.true is None else printable(shown.true)
    verdict = {None: "", True: "right", False: "wrong"}[shown.correct]
    alt = f"{path.name}: {name}, {probability:.1%}" + (f", actually {true}" if verdict == "wrong" else "")
    flag = "" if shown.correct is None else str(int(shown.correct))
    mark = f'<span class="mark" title="{verdict}">{"✓" if shown.correct else "✗"}</span>' if verdict else ""
    truth = f'<p class="truth">actually {escape(true)}</p>' if verdict == "wrong" else ""
    folder = f"{path.parent}/" if path.parent.name else ""
    width, height = shown.picture.size
    return (
        f'<article class="card {verdict}" data-number="{number}" data-correct="{flag}" '
        f'data-probability="{probability:.6f}" data-class="{escape(name)}" '
        f'data-text="{escape(f"{shown.name} {name} {true}".lower())}">'
        f'<button type="button" class="open" aria-label="{escape(alt)}">'
        f'<span class="frame" data-show="heat" style="--w:{width};--h:{height}">'
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" decoding="async" loading="lazy" '
        f'src="data:image/jpeg;base64,{_jpeg(shown.picture)}">{_overlay(shown, patches)}</span></button>'
        f'<div class="caption">'
        f'<p class="prediction"><b>{mark}{escape(name)}</b><span>{probability:.1%}</span></p>{truth}'
        f'<p class="file" title="{escape(shown.name)}"><span>{escape(folder)}</span>{escape(path.name)}</p>'
        f"{_classes(shown)}{_other_picks(shown, noun, other)}</div></article>\n"
    )


def _classes(shown: Shown) -> str:
    rows = "".join(
        f'<li style="--p:{probability:.4f}"><span>{escape(printable(name))}</span><b>{probability:.1%}</b></li>'
        for name, probability in shown.found
    )
    return f'<ol class="classes">{rows}</ol>'


def _other_picks(shown: Shown, noun: str, other: str) -> str:
    layers = [str(layer) for layer, picks in enumerate(shown.index.tolist(), start=1) if 0 in picks]
    if not layers:
        return ""
    layer = noun.capitalize() + "s" * (len(layers) > 1)
    pick = "picks" if len(layers) == 1 else "pick"
    return f'<p class="token">{layer} {", ".join(layers)} {pick} {other}.</p>'


def _jpeg(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _overlay(shown: Shown, grid: PatchGrid) -> str:
    """The picks over the picture: a group for each layer, and the patches by how many layers pick them.

    A unit of the groups is the way from one patch to the next.
    """
    grid = grid.times(1 / grid.stride)
    width, height = shown.picture.size
    left, top, right, bottom = (share * side for share, side in zip(shown.region, (width, height, width, height)))
    across, down = (right - left) / grid.side, (bottom - top) / grid.side
    place = f"matrix({across:.5g} 0 0 {down:.5g} {left:.5g} {top:.5g})"
    seen = f"M{left:.5g} {top:.5g}H{right:.5g}V{bottom:.5g}H{left:.5g}z"
    layers = [[pick for pick in picks if pick > 0] for picks in shown.index.tolist()]
    times = Counter(patch for picks in layers for patch in picks)
    ground = f"M0 0H{grid.side:.5g}V{grid.side:.5g}H0z"
    groups = []
    for number, picks in enumerate(layers, start=1):
        path = _patches(picks, grid)
        groups.append(
            f'<g class="layer l{number}"><path class="veil" d="{ground}{path}"/><path class="pick" d="{path}"/></g>'
        )
    levels = []
    for count in sorted(set(times.values())):
        patches = _patches([patch for patch, many in times.items() if many == count], grid)
        share = (count - 1) / max(len(layers) - 1, 1)
        colour, opacity = _rgb(_between(HEAT_COLOURS, share)), 0.35 + 0.4 * min(2 * share, 1)
        levels.append(f'<path fill="{colour}" fill-opacity="{opacity:.2f}" d="{patches}"/>')
    heat = f'<g class="heat"><path class="veil" d="{ground}{_patches(times, grid)}"/>{"".join(levels)}</g>'
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<path class="outside" d="M-1-1H{width + 1}V{height + 1}H-1z{seen}"/><path class="seen" d="{seen}"/>'
        f'<g transform="{place}">{heat}{"".join(groups)}</g></svg>'
    )


def _patches(patches: Iterable[int], grid: PatchGrid) -> str:
    """Patches as an SVG path, in the grid's unit."""
    size = f"{grid.size:.5g}"
    corners = (grid.box(patch)[:2] for patch in sorted(patches))
    return "".join(f"M{left:.5g} {top:.5g}h{size}v{size}h-{size}z" for left, top in corners)


def _layer_rules(layers: int) -> str:
    """The CSS that shows one layer's group, and gives each its colour."""
    rules = []
    for number in range(1, layers + 1):
        colour = _rgb(_between(LAYER_COLOURS, (number - 1) / max(layers - 1, 1)))
        rules.append(f'.frame[data-show="l{number}"] .l{number}{{display:inline}}.l{number}{{--layer:{colour}}}')
    return "\n".join(rules)


def _between(colours: Sequence[tuple[int, int, int]], share: float) -> tuple[int, ...]:
    """The colour at a share of the way from the first to the last."""
    place = share * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    return tuple(round(a + (b - a) * (place - first)) for a, b in zip(colours[first], colours[first + 1]))


def _rgb(colour: Sequence[int]) -> str:
    return f"rgb({' '.join(map(str, colour))})"


def _problems(problems: Sequence[tuple[str, str]]) -> str:
    if not problems:
        return ""
    rows = "".join(f"<li><b>{escape(name)}</b> {escape(text)}</li>" for name, text in problems)
    return f'<section id="problems"><h2>{_count(len(problems), "file")} could not be read</h2><ul>{rows}</ul></section>'


def _footer(gallery: Gallery) -> str:
    keys = [("/", "search"), ("← → ↑ ↓", "move"), ("Enter", "open"), ("Esc", "close or clear")]
    shown = "".join(f"<span><kbd>{key}</kbd> {text}</span>" for key, text in keys)
    source = f"{printable(gallery.checkpoint)} · ffvt {__version__}"
    return f'<footer><p class="keys">{shown}</p><p>{escape(source)}</p></footer>'


def _dialog() -> str:
    return (
        '<dialog id="detail" tabindex="-1" aria-label="One image"><div class="bar"><button type="button" id="previous" '
        'aria-label="Previous image">←</button><button type="button" id="next" aria-label="Next image">→</button>'
        '<span id="place"></span><button type="button" id="close" aria-label="Close">✕</button></div>'
        '<div class="body"><div id="large"></div><div id="side"></div></div><div id="strip"></div></dialog>'
    )
