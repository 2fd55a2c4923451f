"""A page is one file, and text stays text."""

import base64
import io
import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ffvt.report.page import Page


def test_text_on_a_page_is_escaped():
    page = Page("a < b")
    page.paragraph("<script>")
    assert "<h1>a &lt; b</h1>" in page.render()
    assert "<script>" not in page.render()


def test_a_page_holds_its_parts_in_order_and_its_figures_inside():
    page = Page("title")
    page.heading("first")
    page.facts([("43 %", "a < b")])
    page.figure(Figure(figsize=(1, 1)), 'a "figure"')
    page.footer("last")
    html = page.render()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    places = [html.index(part) for part in ("<h2>first", "<b>43 %</b><span>a &lt; b", "data:image/png;base64,", "last")]
    assert places == sorted(places)
    assert 'alt="a &quot;figure&quot;"' in html


def test_a_figure_is_legible_on_light_and_on_dark_pages():
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.set_title("title", color="#0f172a")
    page = Page("title")
    page.figure(figure, "axes")
    found = re.search(
        r'dark\)" srcset="data:image/png;base64,([^"]+)"><img alt="axes" src="data:[^,]+,([^"]+)"', page.render()
    )
    dark, light = (np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in found.groups())
    for pixels in (dark, light):
        assert pixels[0, 0, 3] == 0  # the page shows through
    assert dark[dark[..., 3] == 255][:, :3].min() > 150
    assert light[light[..., 3] == 255][:, :3].max() < 100
