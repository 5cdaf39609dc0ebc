"""Reports for people as one HTML file: opens offline, asks nobody for anything, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
DOTS_PER_INCH = 150
NOTICES = ("good", "bad", "warning", "note")
# What a reader does not see, or what turns the text around it: control characters, marks of direction, halves of pairs.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Texts that stand to the right in a column, as numbers do: 0.5, 1,024, -3, 62.5 %, +2.
_LIKE_A_NUMBER = re.compile(r"[-+−]?\d[\d.,]*(e[-+]\d+)?( ?%)?")


class Page:
    """One report, built from top to bottom. All text is escaped: whatever it holds, it is shown and not interpreted.
    Control characters and marks of direction, which would not be seen, stand there as \\u202e.

    Args:
        title: the page's name, shown on top and in the browser's tab.
        css: rules beside the page's own, for what `markup` adds.
    """

    def __init__(self, title: str, *, css: str = "") -> None:
        self.title = title
        self.css = css
        self._parts: list[Markup] = []

    def heading(self, text: str) -> None:
        self._add("<h2>{}</h2>", text)

    def paragraph(self, text: str) -> None:
        self._add("<p>{}</p>", text)

    def notice(self, kind: str, text: str) -> None:
        """A sentence that must not be missed; `kind`, one of NOTICES, stands before it as a word too."""
        if kind not in NOTICES:
            raise ValueError(f"kind {kind!r}, but should be one of {', '.join(NOTICES)}")
        self._add('<div class="notice {0}" role="note"><b>{0}</b>: {1}</div>', kind, text)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> None:
        """A table that scrolls by itself where it is wider than the screen.

        rows: as many cells each as there are headers. Floats are shown with four digits, None as an empty cell, a Markup as the
            HTML that it is, anything else as its escaped text. Columns of numbers are aligned to the right.

        Raises:
            ValueError: a row with more or fewer cells.
        """
        cells = [[_shown(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(headers)} columns")
        kinds = [Markup(' class="number"') if _is_numeric(column) else "" for column in zip(*cells, strict=True)]
        kinds = kinds or [""] * len(headers)
        head = _joined('<th scope="col"{}>{}</th>', zip(kinds, headers, strict=True))
        body = _joined("<tr>{}</tr>\n", ((_joined("<td{}>{}</td>", zip(kinds, row, strict=True)),) for row in cells))
        title = Markup("<caption>{}</caption>").format(caption) if caption else ""
        table = Markup("<table>{}<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody></table>").format(title, head, body)
        self._add('<div class="scroll" role="region" tabindex="0" aria-label="{}">{}</div>', caption or "table", table)

    def figure(self, figure: Figure, caption: str, alt: str | None = None) -> None:
        """A picture and the sentence under it. alt: what somebody who cannot see it should know; None takes the caption."""
        data = base64.b64encode(png(figure)).decode()
        width = round(figure.get_figwidth() * 96)
        image = '<img style="--width: {}px" width="{}" height="{}" alt="{}" src="data:image/png;base64,{}">'
        size = (width, width, round(figure.get_figheight() * 96))
        shown = Markup(image).format(*size, caption if alt is None else alt, data)
        scroll = Markup('<div class="scroll" role="region" tabindex="0" aria-label="picture">{}</div>').format(shown)
        self._add("<figure>{}<figcaption>{}</figcaption></figure>", scroll, caption)

    def markup(self, html: Markup) -> None:
        """HTML as it is. Build it with `Markup("<b>{}</b>").format(text)`, which escapes the text.

        Raises:
            TypeError: a plain string, of which nobody said that it is safe.
        """
        if not isinstance(html, Markup):
            raise TypeError(f"markup takes a markupsafe.Markup, not a {type(html).__name__}; paragraph shows plain text")
        self._parts.append(html)

    def html(self) -> str:
        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
        css = (TEMPLATES / "page.css").read_text(encoding="utf-8") + self.css
        version = importlib.metadata.version("dylo-moe")
        template = environment.get_template("page.html")
        whole = template.render(title=self.title, css=Markup(css), parts=self._parts, version=version)
        return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], whole)

    def data(self) -> bytes:
        """The whole file."""
        return self.html().encode()

    def _add(self, html: str, *values: object) -> None:
        self._parts.append(Markup(html).format(*values))


def png(figure: Figure) -> bytes:
    """A figure as PNG, 150 dots per inch, the same bytes for the same figure."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # Names are data: a dollar sign in one is no formula. What is still empty is an axis's own number, drawn later.
        if text.get_text() and "\\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _joined(html: str, rows: Iterable[Sequence[object]]) -> Markup:
    return Markup("").join(Markup(html).format(*row) for row in rows)


def _shown(cell: object) -> str | Markup:
    if cell is None:
        return ""
    return escape(f"{cell:.4g}") if isinstance(cell, float) else escape(cell)


def _is_numeric(column: Sequence[str]) -> bool:
    filled = [str(cell) for cell in column if cell]
    return bool(filled) and all(_LIKE_A_NUMBER.fullmatch(cell) for cell in filled)
