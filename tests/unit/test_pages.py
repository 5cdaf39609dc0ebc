"""Pages: hostile text stays text, one file that asks for nothing, readable at a phone's width in a real browser."""

from __future__ import annotations

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from dylo_moe.pages import Page, png
from tests.browser import assert_readable, look

HOSTILE = "<script>alert(1)</script><img src=http://example.com/x.png onerror=alert(2)>\"'&{{ 7 * 7 }}"


def drawing(label="a"):
    figure = Figure(figsize=(10, 3))
    axes = figure.add_subplot()
    axes.plot([1, 2], [1, 1000])
    axes.set_yscale("log")
    axes.set_xticks([1, 2], [label, "b"])
    axes.set_title(label)
    return figure


def full_page(text="plain"):
    page = Page(f"Title {text}", css=".mine { color: red; }")
    page.heading(text)
    page.paragraph(text)
    page.notice("warning", text)
    page.table([text, *(f"column {i}" for i in range(20))], [[text, *range(20)]], text)
    page.figure(drawing(), text)
    page.markup(Markup('<p class="mine">{}</p>').format(text))
    return page


def test_hostile_text_is_shown_and_not_interpreted(tmp_path):
    page = tmp_path / "page.html"
    page.write_bytes(full_page(HOSTILE).data())
    content = page.read_text()
    assert "<script" not in content and "onerror=alert(2)>" not in content
    seen = look(page, "h2", "table", "figure img", ".notice", ".mine")
    assert_readable(seen)
    assert seen.visible == {"h2": 1, "table": 1, "figure img": 1, ".notice": 1, ".mine": 1}
    assert seen.text.count(HOSTILE) >= 6 and seen.title == f"Title {HOSTILE}"


def test_page_is_dark_where_the_reader_wants_it_so(tmp_path):
    (tmp_path / "page.html").write_bytes(full_page().data())
    assert look(tmp_path / "page.html").background == "rgb(255, 255, 255)"
    assert look(tmp_path / "page.html", dark=True).background == "rgb(21, 24, 28)"


def test_browser_check_notices_a_page_that_is_none_of_this(tmp_path):
    bad = '<title>x</title><p style="width:900px">w</p><script>console.error("boo")</script><img src="http://example.com/a.png">'
    (tmp_path / "bad.html").write_text(bad)
    seen = look(tmp_path / "bad.html", "p", "table")
    assert seen.overflow > 400 and seen.scripts == 1 and len(seen.broken_images) == 1
    assert any("boo" in line for line in seen.console)
    assert seen.requests == ["GET http://example.com/a.png"]
    assert seen.visible == {"p": 1, "table": 0}


def test_dollar_signs_in_labels_are_no_formulas():
    assert png(drawing("$\\frac{ and $")).startswith(b"\x89PNG")


def test_same_figure_gives_the_same_bytes_and_another_one_does_not():
    assert png(drawing()) == png(drawing()) != png(drawing("c"))


def test_what_turns_text_around_or_cannot_be_seen_is_written_as_an_escape():
    unseen = "\udc80 \u202e \u2066 \x00 \x1b[31m \u2028"
    content = full_page(f"broken {unseen} text\tof\nlines").data()
    assert not [char for char in unseen if char > "~" or char < " " if char.encode("utf-8", "surrogatepass") in content]
    assert content.count(b"broken \\udc80 \\u202e \\u2066 \\x00 \\x1b[31m \\u2028 text\tof\nlines") >= 9


def test_table_aligns_numbers_and_formats_floats():
    page = Page("x")
    page.table(["name", "share"], [["a", 1 / 3], ["b", None], ["c", "62.5 %"]])
    content = page.html()
    assert '<td>a</td><td class="number">0.3333</td>' in content
    assert '<td>b</td><td class="number"></td>' in content
    page.table(["name"], [])
    assert '<th scope="col">name</th>' in page.html()


def test_wrong_use_is_refused():
    page = Page("x")
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        page.table(["a", "b"], [["only one"]])
    with pytest.raises(TypeError, match="Markup"):
        page.markup("<b>not known to be safe</b>")
    with pytest.raises(ValueError, match="good, bad, warning, note"):
        page.notice("shout", "x")
