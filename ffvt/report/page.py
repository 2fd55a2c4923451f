"""One self-contained HTML page from headings, paragraphs, numbers and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #0f172a; background: #fff;
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.9rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin-top: 2.4rem }
p { color: #334155; max-width: 46rem } img { max-width: 100%; height: auto }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.6rem 0 }
.facts div { flex: 1 1 11rem; border: 1px solid #e2e8f0; border-radius: .6rem; padding: .9rem 1.1rem }
.facts b { display: block; font-size: 1.9rem; color: #c2410c } .facts span { color: #475569; font-size: .92rem }
footer { margin-top: 3rem; color: #64748b; font-size: .88rem; border-top: 1px solid #e2e8f0; padding-top: 1rem }
"""


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
        """A figure, embedded as PNG."""
        data = base64.b64encode(png(figure)).decode()
        self._parts.append(f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">')

    def footer(self, text: str) -> None:
        """Small print at the end."""
        self._parts.append(f"<footer>{html.escape(text)}</footer>")

    def render(self) -> str:
        """The page as HTML."""
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(self._parts)}</body></html>\n'


def png(figure: Figure, dpi: int = 130) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
