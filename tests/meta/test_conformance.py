"""The matrix of laws and implementations: what a cell says, and that no failure goes unexplained."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from fixtures.verdicts import check, checkpoint, verdict
from harness import outcome
from harness.conformance import FINDINGS, anchor, cells, conformance, heading, main
from harness.outcome import Unusable

DOCS = Path(__file__).resolve().parents[2] / "docs"
HEADING = "PEFT ignores `routing_weights` and sums the active adapters"
VERSIONS = dict.fromkeys(("python", "torch", "transformers", "peft", "evalplus", "dylo-moe"), "1")


def judged(subject: str, *outcomes: str) -> dict:
    """A verdict of one law on one specimen per outcome."""
    checkpoints = [checkpoint(check("layer.law", found), name=f"s{i}") for i, found in enumerate(outcomes)]
    return {**verdict(*checkpoints), "subject": subject, "versions": VERSIONS}


@pytest.mark.parametrize(
    ("outcomes", "cell"),
    [
        (["pass", "pass"], ("pass", "")),
        (["pass", "fail", "pass", "not applicable"], ("fail", " 1 of 3")),
        (["fail", "fail", "not applicable"], ("fail", "")),
        (["fail", "error"], ("error", " 1 of 2")),
        (["not applicable", "pass"], ("pass", "")),
        (["not applicable"], ("not applicable", "")),
        (["pass", "void"], ("void", "")),
        (["void", "inconclusive"], ("inconclusive", "")),
    ],
)
def test_a_cell_is_the_worst_outcome_over_the_specimens(outcomes, cell):
    assert cells(judged("one", *outcomes)) == {"layer.law": cell}


def test_every_outcome_has_a_severity_and_a_mark():
    for found in outcome.OUTCOMES:
        page = conformance([judged("one", found)], {"one": {"*": HEADING}})
        assert "| `layer.law` |" in page


def test_a_failure_without_a_finding_is_refused_by_name():
    assert "layer.law" in conformance([judged("one", "fail")], {"one": {"layer.*": HEADING}})
    with pytest.raises(Unusable, match="two: layer.law"):
        conformance([judged("one", "fail"), judged("two", "fail")], {"one": {"layer.*": HEADING}})


def test_a_failing_cell_links_to_its_finding_and_another_subject_has_its_own_column():
    page = conformance([judged("one", "fail"), judged("two", "pass")], {"one": {"layer.law": HEADING}})
    assert "| law | one | two |" in page
    assert "| `layer.law` | [✗](findings.md#peft-ignores-routing_weights-and-sums-the-active-adapters) | ✓ |" in page


def test_a_law_that_a_subject_was_not_asked_is_an_empty_cell():
    other = judged("two")
    other["checkpoints"] = [checkpoint(check("model.other"))]
    page = conformance([judged("one", "pass"), other], {})
    assert "| `layer.law` | ✓ |  |" in page
    assert "| `model.other` |  | ✓ |" in page


def test_the_recorded_findings_exist():
    headings = re.findall(r"^## (.*)$", (DOCS / "findings.md").read_text(), flags=re.MULTILINE)
    assert HEADING in headings
    for laws in tomllib.loads(FINDINGS.read_text()).values():
        for glob, text in laws.items():
            assert text in headings, glob


def test_verdicts_that_are_there_are_shown_and_not_judged_again(tmp_path):
    files = []
    for subject in ("one", "two"):
        files += ["--verdict", str(tmp_path / f"{subject}.json")]
        (tmp_path / f"{subject}.json").write_text(json.dumps(judged(subject, "pass")))
    page = tmp_path / "page.md"
    assert main([*files, "--subject", "two", "--subject", "one", "--output", str(page)]) == 0
    assert "| law | two | one |" in page.read_text()


def test_the_committed_matrix_links_to_findings_that_exist():
    page = (DOCS / "conformance.md").read_text()
    headings = re.findall(r"^## (.*)$", (DOCS / "findings.md").read_text(), flags=re.MULTILINE)
    links = re.findall(r"findings\.md#([^)]*)", page)
    assert set(links) <= {anchor(text) for text in headings}
    for subject in ("dylo-moe", "naive-loop", "multi-pass", "peft-xlora", "peft-arrow"):
        assert f" {subject} |" in page


def test_globs_are_tried_in_the_order_of_the_file():
    assert heading({"one": {"layer.law": "first", "*": "second"}}, "one", "layer.law") == "first"
    assert heading({"one": {"layer.law": "first", "*": "second"}}, "one", "model.law") == "second"
    assert heading({}, "one", "model.law") is None
