"""Reports come from the document alone, hold what it says, and no text in it can act."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fixtures.verdicts import check, checkpoint, verdict
from harness import report

HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=y> | `code` $x^{$ **b** [l](http://h) @all \x00\x1b[31m\n# h"


class Reader(HTMLParser):
    """Collects tags, their attributes and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def document():
    ratios = {"routed/base": {"ratio": 1.2, "low": 1.1, "high": 1.3, "limit": 2.0, "kind": "time"}}
    first = checkpoint(
        check("layer.equals_oracle", required_tolerance=0.25),
        check("layer.law", "fail", message="got 2, wanted 3", required_tolerance="inf"),
        check("speed.time", ratios=ratios),
        name="alpha",
        drift={"logit_difference_max": 0.75},
    )
    second = checkpoint(check("layer.equals_oracle", required_tolerance=0.5), check("layer.void", "void"), name="beta", digit="b")
    problem = {"kind": "fail", "checkpoint": "alpha", "check": "layer.law", "outcome": "fail", "message": "got 2, wanted 3"}
    return verdict(first, second, exit_code=1, problems=[problem])


@pytest.fixture
def hostile():
    bad = check("layer.law", "fail", message=HOSTILE, required_tolerance=2.0, ratios={HOSTILE: {"ratio": 1.0, "kind": "count"}})
    bad |= {"statement": HOSTILE, "traceback": HOSTILE, "reproduce": HOSTILE, "blame": "subject"}
    problem = {"kind": "fail", "checkpoint": HOSTILE, "check": "layer.law", "outcome": "fail", "message": HOSTILE}
    entry = checkpoint(bad, name=HOSTILE, drift={HOSTILE: 1.0}) | {"path": HOSTILE, "format": HOSTILE, "warnings": [HOSTILE]}
    return verdict(entry, exit_code=1, problems=[problem]) | {"subject": HOSTILE, "command": [HOSTILE]}


def test_html_tells_verdict_problem_and_every_check(document):
    text = Reader(report.html(document)).text
    for told in ("fail", "got 2, wanted 3", "layer.equals_oracle", "alpha", "beta", "a" * 64):
        assert told in text


def test_html_needs_nothing_from_outside_and_runs_nothing(document):
    page = report.html(document)
    reader = Reader(page)
    assert reader.tags.count("svg") == 3  # tolerances, ratios, drift
    assert not {"script", "link", "iframe", "object", "img"} & set(reader.tags)
    outside = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]
    assert outside == []
    assert "url(http" not in page and "@import" not in page


def test_html_without_anything_to_draw_has_no_picture():
    assert "svg" not in Reader(report.html(verdict(checkpoint(check())))).tags


def test_html_shows_hostile_text_and_does_not_run_it(hostile):
    reader = Reader(report.html(hostile))
    assert not {"script", "img", "h"} & set(reader.tags)
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert "<script>alert(1)</script>" in reader.text


def test_escaping_test_can_fail(hostile):
    reader = Reader(f"<p>{HOSTILE}</p>")
    assert "script" in reader.tags and "img" in reader.tags


def test_junit_counts_what_the_verdict_counts(document):
    root = ElementTree.fromstring(report.junit_xml(document))
    suites = {suite.get("name"): suite for suite in root}
    assert (suites["alpha"].get("tests"), suites["alpha"].get("failures")) == ("3", "1")
    assert (suites["beta"].get("failures"), suites["beta"].get("errors")) == ("1", "0")  # void, and required
    failure = suites["alpha"].find("testcase[@name='law']/failure")
    assert failure.get("message") == "fail: got 2, wanted 3"
    assert "--only layer.law" in failure.text


def test_junit_advisory_failure_is_skipped_and_error_is_error():
    root = ElementTree.fromstring(
        report.junit_xml(verdict(checkpoint({**check("a.x", "fail"), "required": False}, check("a.y", "error"))))
    )
    assert (root[0].get("failures"), root[0].get("skipped"), root[0].get("errors")) == ("0", "1", "1")


def test_junit_is_well_formed_with_hostile_text(hostile):
    root = ElementTree.fromstring(report.junit_xml(hostile))
    assert root[0].get("name").startswith("<script>")
    assert root.find(".//script") is None


def test_markdown_tables_keep_their_columns_with_hostile_text(hostile):
    lines = report.markdown(hostile).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 8
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 4, 5, 6}
    assert not any("<script" in line or re.search(r"(?<!\\)@", line) and "@&#8203;" not in line for line in lines)
    assert not any(line.startswith("# h") for line in lines)


def test_markdown_tells_verdict_problem_drift_and_ratio(document):
    text = report.markdown(document)
    for told in ("validate_moe_modifications: fail", "got 2, wanted 3", "0.75", "1.1 to 1.3"):
        assert told in text


def test_terminal_text_tells_what_failed_and_how_to_see_it_again(document):
    text = report.text(document, {"json": Path("validation/verdict.json")})
    assert text.splitlines()[1].startswith("FAIL")
    assert "fail: layer.law on alpha (fail)" in text
    assert "again: validate_moe_modifications --only layer.law" in text
    assert "validation/verdict.json" in text


def test_terminal_text_cannot_move_the_cursor(hostile):
    assert "\x1b" not in report.text(hostile, {})


def test_terminal_text_says_how_many_problems_it_leaves_out(document):
    document["problems"] *= 25
    assert "and 5 more in the report" in report.text(document, {})


def test_grid_leaves_a_gap_where_a_check_was_not_run(document):
    cells = dict(report.grid(document))
    assert cells["layer.law"][1] is None
    assert cells["layer.void"][0] is None
