"""A page is one file, and text stays text."""

from matplotlib.figure import Figure

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
    places = [html.index(part) for part in ("<h2>first", "<b>43 %</b><span>a &lt; b", "data:image/png;base64,", "last")]
    assert places == sorted(places)
    assert 'alt="a &quot;figure&quot;"' in html
