"""One self-contained HTML page from headings, paragraphs, numbers and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from colorsys import hls_to_rgb, rgb_to_hls

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

_STYLE = """
:root { --ground: #fff; --ink: #0f172a; --text: #334155; --soft: #64748b; --line: #e2e8f0; --accent: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0b1120; --ink: #e8edf5; --text: #cbd5e1; --soft: #9fb0c7; --line: #263249; --accent: #fb923c }
}
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.6vw, 1.9rem); line-height: 1.2; text-wrap: balance }
h2 { font-size: 1.25rem; margin-top: 2.4rem }
p { color: var(--text); max-width: 46rem }
.figure { overflow-x: auto } .figure img { display: block; width: 100%; min-width: 36rem; height: auto }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.6rem 0 }
.facts div { flex: 1 1 11rem; border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem }
.facts b { display: block; font-size: 1.9rem; color: var(--accent) }
.facts span { color: var(--soft); font-size: .92rem }
footer { margin-top: 3rem; color: var(--soft); font-size: .88rem; border-top: 1px solid var(--line); padding-top: 1rem;
  overflow-wrap: anywhere }
"""
LIGHT = "#cbd5e1"  # lines of axes on a dark page
LIGHTNESS = 0.75  # of text on a dark page, at least


class Page:
    """Collects the parts of a page in order; `render` gives its HTML."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Large numbers, each with what it says."""
        cells = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(text)}</span></div>" for n, text in facts)
        self._parts.append(f'<div class="facts">{cells}</div>')

    def figure(self, figure: Figure, description: str) -> None:
        """A figure, embedded as PNG for light and for dark pages; it is left in the colours of the latter."""
        light = _data(figure)
        _lighten(figure)
        self._parts.append(
            f'<div class="figure"><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(figure)}">'
            f'<img alt="{html.escape(description)}" src="{light}"></picture></div>'
        )

    def footer(self, text: str) -> None:
        """Small print at the end."""
        self._parts.append(f"<footer>{html.escape(text)}</footer>")

    def render(self) -> str:
        """The page as HTML."""
        viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head = f'<meta charset="utf-8">{viewport}<title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(self._parts)}</body></html>\n'


def _data(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _lighten(figure: Figure) -> None:
    """Gives text and axes of a figure colours that are legible on a dark page; what is drawn keeps its own."""
    for text in figure.findobj(Text):
        hue, lightness, saturation = rgb_to_hls(*to_rgb(text.get_color()))
        text.set_color(hls_to_rgb(hue, max(lightness, LIGHTNESS), saturation))
    for axes in figure.axes:
        axes.tick_params(colors=LIGHT)
        axes.spines[:].set_edgecolor(LIGHT)
