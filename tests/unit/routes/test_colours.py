"""Coloured tokens: hostile pieces and names stay text, and colour is never the only mark."""

from __future__ import annotations

import re

import numpy as np

from dylo_moe.routes.colours import LINES, PALETTE, Coloured, coloured, legend, palette_css
from dylo_moe.routes.tokens import Piece

HOSTILE = '<script>alert("1")</script>'


def block(pieces, shares, experts=("a", "b"), prompt_length=9, left_out=0):
    text = Coloured("name", [Piece(piece, False) for piece in pieces], np.array(shares), prompt_length, left_out)
    return str(coloured(text, experts))


def test_hostile_tokens_and_experts_are_escaped_in_text_and_tooltip():
    html = block([HOSTILE], [[0.25, 0.75]], experts=("a", HOSTILE)) + str(legend([HOSTILE]))
    assert "<script" not in html and html.count("&lt;script&gt;") == 3
    assert 'title="expert 1 (&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;): 75%, expert 0 (a): 25%"' in html


def test_number_of_the_expert_stands_where_it_changes():
    html = block("wxyz", [[1, 0], [0.9, 0.1], [0, 1], [1, 0]])
    assert re.findall(r"<sup>(\d)</sup>", html) == ["0", "1", "0"]
    assert re.findall(r'class="(e\d) s(\d)"', html) == [("e0", "4"), ("e0", "4"), ("e1", "4"), ("e0", "4")]


def test_larger_share_is_stronger_and_nobody_has_no_colour():
    html = block("wxyz", [[0.55, 0.45], [0.8, 0.2], [0.5, 0.5], [0, 0]])
    assert re.findall(r'class="([^"]+)"', html)[1:] == ["e0 s3", "e0 s4", "nobody", "nobody"]
    assert 'title="no expert"' in html


def test_completion_begins_below_a_line_and_what_is_left_out_is_counted():
    html = block("wxy", [[1, 0]] * 3, prompt_length=1, left_out=7)
    assert html.index(">w<") < html.index("<hr>") < html.index(">x<") and "7 more tokens are not shown" in html
    assert "<hr>" not in block("wxy", [[1, 0]] * 3, prompt_length=3)


def test_experts_beyond_the_palette_differ_by_their_line():
    css = palette_css(len(PALETTE) * len(LINES))
    looks = re.findall(r"\.e\d+ \{ (--c: [^;]+; border-bottom-style: \w+)", css)
    assert len(looks) == len(set(looks)) == 32
