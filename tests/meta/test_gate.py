"""Outcomes, rules and budgets add up to the exit code that is promised, and gate.toml holds together."""

from __future__ import annotations

import re

import pytest

from fixtures.verdicts import check, checkpoint
from harness.catalogue import CHECKS, read_laws
from harness.gate import GATE_FILE, exit_code, load_gate, problems
from harness.outcome import Unusable


def judged(*checks, gate=None, calibration=(), drift=None):
    return exit_code(problems(gate or load_gate(), [checkpoint(*checks, drift=drift)], calibration))


def user_gate(tmp_path, text):
    path = tmp_path / "gate.toml"
    path.write_text(f"schema = 1\n{text}")
    return load_gate(path)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("pass", 0), ("not applicable", 0), ("fail", 1), ("error", 1), ("void", 4), ("inconclusive", 4)],
)
def test_outcome_gives_its_exit_code(outcome, code):
    assert judged(check("a.ok"), check("a.law", outcome)) == code


def test_run_in_which_no_check_applied_decides_nothing():
    assert judged(check("a.law", "not applicable")) == 4
    assert judged(check("a.law", "not applicable"), check("a.ok")) == 0


def test_failure_outranks_undecided_and_the_judges_own_error_outranks_both():
    assert judged(check("a.x", "void"), check("a.y", "fail")) == 1
    assert judged(check("a.y", "fail"), {**check("a.z", "error"), "blame": "judge"}) == 3


def test_failed_calibration_is_the_judges_failure_and_an_undecided_clock_is_not():
    assert judged(check("a.ok"), calibration=[check("calibration.reference", "fail")]) == 3
    assert judged(check("a.ok"), calibration=[check("calibration.clock", "inconclusive")]) == 4


def test_advisory_check_is_told_and_does_not_decide(tmp_path):
    gate = user_gate(tmp_path, '[[rules]]\nchecks = "a.*"\nrequired = false\nreason = "we serve greedy only"\n')
    found = problems(gate, [checkpoint(check("a.law", "fail"), check("b.law"))], [])
    assert [problem.kind for problem in found] == ["advisory"]
    assert exit_code(found) == 0
    assert judged(check("b.law", "fail"), gate=gate) == 1


@pytest.mark.parametrize(("value", "code"), [(0.4, 0), (0.6, 1), (float("nan"), 1)])
def test_drift_over_its_budget_fails(tmp_path, value, code):
    gate = user_gate(tmp_path, '[drift.logit_difference_max]\nbudget = 0.5\nreason = "trained with multi-pass"\n')
    assert judged(check(), gate=gate, drift={"logit_difference_max": value}) == code


@pytest.mark.parametrize(("value", "code"), [(0.99, 0), (0.9, 1)])
def test_agreement_under_its_budget_fails(tmp_path, value, code):
    gate = user_gate(tmp_path, '[drift.top1_agreement]\nbudget = 0.95\nreason = "greedy service"\n')
    assert judged(check(), gate=gate, drift={"top1_agreement": value}) == code


def test_budget_for_a_drift_that_was_not_measured_is_undecided(tmp_path):
    gate = user_gate(tmp_path, '[drift.logit_difference_max]\nbudget = 0.5\nreason = "x"\n')
    assert judged(check(), gate=gate) == 4


def test_without_a_budget_drift_is_reported_only():
    assert judged(check(), drift={"logit_difference_max": 99.0}) == 0


def test_users_threshold_replaces_ours_and_the_rest_stays(tmp_path):
    gate = user_gate(tmp_path, '[thresholds.time_band]\nvalue = 0.5\nreason = "a noisy machine"\n')
    assert gate.threshold("time_band") == 0.5
    assert gate.threshold("count_band") == load_gate().threshold("count_band")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[thresholds.time_bnd]\nvalue = 1\nreason = 'x'", "time_bnd"),
        ("[thresholds.time_band]\nvalue = 1", "thresholds.time_band"),
        ("[thresholds.time_band]\nvalue = true\nreason = 'x'", "thresholds.time_band.value"),
        ("[[rules]]\nchecks = 'a'\nrequired = 1\nreason = 'x'", "rules[0].required"),
        ("[thresolds]", "thresolds"),
        ("[", "not a readable TOML"),
    ],
)
def test_defective_gate_file_is_refused_naming_the_entry(tmp_path, text, word):
    with pytest.raises(Unusable, match=re.escape(word)) as raised:
        user_gate(tmp_path, text)
    assert "\n" not in str(raised.value).strip()


def test_every_threshold_has_a_reason_and_is_used_somewhere():
    source = "".join(path.read_text() for path in [*CHECKS.glob("*.py"), *CHECKS.parent.glob("*.py")])
    gate = load_gate()
    assert gate.thresholds
    for name, threshold in gate.thresholds.items():
        assert len(threshold.reason) > 20, name
        assert f'"{name}"' in source, f"{name} in {GATE_FILE.name} is used nowhere"


def test_every_law_has_statement_reason_and_tolerance_and_every_rule_a_law():
    laws = read_laws()
    assert len(laws) > 20
    for law in laws:
        assert law.statement and law.reason and law.tolerance, law.id
    assert len({law.id for law in laws}) == len(laws)
    assert all(load_gate().rule(law.id).required for law in laws)
