"""Tokens in the colour of their expert, for readers with any kind of colour vision, on light and dark ground and on paper.

Colour is never alone: the number of the expert stands wherever it changes, and each expert has a line pattern below its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dylo_moe.routes.measures import dominant
from dylo_moe.routes.tokens import Piece

# Okabe and Ito's palette for every kind of colour vision (2008), without black.
PALETTE = ("0 114 178", "230 159 0", "0 158 115", "213 94 0", "204 121 167", "86 180 233", "240 228 66", "150 150 150")
LINES = ("solid", "dashed", "dotted", "double")
STRENGTHS = 4
LISTED = 3  # experts in a token's tooltip

CSS = """
.tokens { font: 13px/2.15 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 1rem; }
.tokens span, .chip { border-bottom: 3px solid rgb(var(--c, 128 128 128)); padding: 1px 0; border-radius: 2px 2px 0 0;
  background: rgb(var(--c, 128 128 128) / var(--a, 0)); -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.tokens span { margin-right: 1px; }
.tokens .special { font-style: italic; opacity: .75; }
.tokens .nobody { border-bottom: 1px dotted; }
.tokens sup { font: 600 10px/1 system-ui, sans-serif; color: var(--soft); padding: 0 1px 0 2px; }
.tokens sup { -webkit-user-select: none; user-select: none; }
.tokens hr { border: 0; border-top: 1px dashed var(--soft); margin: .4rem 0; }
.legend { line-height: 2.2; }
.chip { padding: 1px .5em; margin-right: .5em; --a: .28; }
.s1 { --a: .1; } .s2 { --a: .2; } .s3 { --a: .3; } .s4 { --a: .42; }
"""


@dataclass(frozen=True)
class Coloured:
    """One text to show: its tokens, the experts' shares of each, (S, E), how many are prompt, and how many are not shown."""

    name: str
    pieces: list[Piece]
    shares: np.ndarray
    prompt_length: int
    left_out: int


def palette_css(num_experts: int) -> str:
    """One class per expert: colours repeat from the 9th on, with another line pattern."""
    rules = [
        f".e{e} {{ --c: {PALETTE[e % len(PALETTE)]}; border-bottom-style: {LINES[e // len(PALETTE) % len(LINES)]} !important; }}"
        for e in range(num_experts)
    ]
    return CSS + "\n".join(rules) + "\n"


def legend(experts: Sequence[str]) -> Markup:
    chips = (Markup('<span class="chip e{0}">{0}: {1}</span> ').format(e, name) for e, name in enumerate(experts))
    return Markup('<p class="legend">{}</p>').format(Markup("").join(chips))


def coloured(text: Coloured, experts: Sequence[str]) -> Markup:
    """A text as one block: tokens in their expert's colour, stronger where its share is larger; a line before the completion."""
    parts: list[Markup] = []
    last: int | None = None
    for place, (piece, share) in enumerate(zip(text.pieces, text.shares, strict=False)):
        if place == text.prompt_length and place:
            parts.append(Markup("<hr>"))
        expert = dominant(share) if share.any() else None
        if expert is not None and expert != last:
            parts.append(Markup("<sup>{}</sup>").format(expert))
        parts.append(_token(piece, share, expert, experts))
        last = expert
    more = Markup('<p class="facts">{} more tokens are not shown.</p>').format(text.left_out) if text.left_out else ""
    return Markup('<div class="tokens">{}</div>{}').format(Markup("").join(parts), more)


def _token(piece: Piece, share: np.ndarray, expert: int | None, experts: Sequence[str]) -> Markup:
    strength = 0 if expert is None else min(int(share[expert] * STRENGTHS) + 1, STRENGTHS)
    classes = "nobody" if expert is None else f"e{expert} s{strength}"
    classes += " special" if piece.is_special else ""
    return Markup('<span class="{}" title="{}">{}</span>').format(classes, _tooltip(share, experts), piece.text)


def _tooltip(share: np.ndarray, experts: Sequence[str]) -> str:
    if not share.any():
        return "no expert"
    order = np.argsort(-share, kind="stable")[:LISTED]
    return ", ".join(f"expert {e} ({experts[e]}): {share[e]:.0%}" for e in order if share[e] > 0)
