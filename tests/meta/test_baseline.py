"""A worse verdict than the baseline is found, a foreign baseline is refused, and only a clean tagged tree makes one."""

from __future__ import annotations

import json
import subprocess

import pytest

from fixtures.verdicts import check, checkpoint, verdict
from harness.baseline import refuse_foreign, refuse_unfit_tree, regressions, update
from harness.gate import exit_code, load_gate
from harness.outcome import Unusable
from harness.verdict import read_verdict, write_verdict


def compared(before, now):
    return regressions(load_gate(), verdict(checkpoint(before)), [checkpoint(now)])


@pytest.mark.parametrize(
    ("before", "now", "is_worse"),
    [
        ("pass", "pass", False),
        ("pass", "not applicable", True),
        ("pass", "void", True),
        ("pass", "fail", True),
        ("void", "inconclusive", False),
        ("inconclusive", "error", True),
        ("fail", "pass", False),
        ("error", "fail", False),
    ],
)
def test_outcome_that_got_worse_is_a_failure(before, now, is_worse):
    found = compared(check(outcome=before), check(outcome=now))
    assert exit_code(found) == int(is_worse)
    if is_worse:
        assert found[0].message == f"was {before} in the baseline, is {now}"


@pytest.mark.parametrize(
    ("before", "now", "is_worse"),
    [(0.05, 0.49, False), (0.05, 0.51, True), (0.0, 0.09, False), (0.0, 0.11, True), (0.9, 0.01, False), (0.05, "inf", True)],
)
def test_tolerance_that_grew_tenfold_is_a_failure_under_its_bound_too(before, now, is_worse):
    found = compared(check(required_tolerance=before), check(required_tolerance=now))
    assert exit_code(found) == int(is_worse)


def ratio(value, spread=0.01, kind="time"):
    return {"routed/base": {"ratio": value, "low": value - spread, "high": value + spread, "kind": kind}}


@pytest.mark.parametrize(
    ("now", "told"),
    [(1.2, None), (1.4, "worse than the baseline"), (0.6, "better than the baseline"), (float("nan"), "worse than the baseline")],
)
def test_ratio_outside_its_band_is_a_failure_in_either_direction(now, told):
    found = compared(check(ratios=ratio(1.0)), check(ratios=ratio(now)))
    assert [problem.outcome for problem in found] == ([told] if told else [])
    assert exit_code(found) == (1 if told else 0)


def test_ratio_whose_interval_reaches_into_the_band_is_no_failure():
    assert compared(check(ratios=ratio(1.0)), check(ratios=ratio(1.4, spread=0.2))) == []


def test_counted_work_has_the_narrow_band():
    assert compared(check(ratios=ratio(1.0, 0, "count")), check(ratios=ratio(1.02, 0, "count")))
    assert not compared(check(ratios=ratio(1.0, 0, "count")), check(ratios=ratio(1.005, 0, "count")))


def test_check_that_the_baseline_lacks_is_not_compared():
    assert compared(check("a.old"), check("a.new", "fail")) == []


@pytest.mark.parametrize(("field", "other"), [("device", "NVIDIA H200"), ("torch", "2.14.0")])
def test_baseline_of_another_environment_is_refused_in_one_line(tmp_path, field, other):
    baseline = verdict(checkpoint(check()))
    here = {**baseline["environment"], field: other}
    with pytest.raises(Unusable, match=f"environment.{field}") as raised:
        refuse_foreign(tmp_path / "b.json", baseline, here, [checkpoint(check())])
    assert "\n" not in str(raised.value)


def test_baseline_of_another_checkpoint_is_refused(tmp_path):
    baseline = verdict(checkpoint(check(), digit="a"))
    refuse_foreign(tmp_path / "b.json", baseline, baseline["environment"], [checkpoint(check(), digit="a")])
    with pytest.raises(Unusable, match="does not hold checkpoint 'mine'"):
        refuse_foreign(tmp_path / "b.json", baseline, baseline["environment"], [checkpoint(check(), digit="b", name="mine")])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "verdict": "pass"}'])
def test_file_that_is_no_verdict_is_refused_naming_it(tmp_path, content):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(Unusable, match="b.json"):
        read_verdict(path)


def test_verdict_is_read_back_as_written_and_not_finite_numbers_survive(tmp_path):
    path = tmp_path / "v" / "verdict.json"
    document = verdict(checkpoint(check(required_tolerance=float("inf"))))
    write_verdict(path, document)
    assert read_verdict(path)["checkpoints"][0]["checks"][0]["evidence"]["required_tolerance"] == "inf"
    assert [entry.name for entry in path.parent.iterdir()] == ["verdict.json"]  # no temporary file is left


def test_failed_verdict_does_not_become_a_baseline(tmp_path):
    path = tmp_path / "b.json"
    with pytest.raises(Unusable, match="left as it was"):
        update(path, verdict(checkpoint(check(outcome="fail")), exit_code=1))
    assert not path.exists()
    update(path, verdict(checkpoint(check())))
    assert json.loads(path.read_text())["exit_code"] == 0


def git(directory, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_baseline_needs_a_repository_a_clean_tree_and_a_tag(tmp_path):
    with pytest.raises(Unusable, match="not in a git repository"):
        refuse_unfit_tree(tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    with pytest.raises(Unusable, match="has no tag"):
        refuse_unfit_tree(tmp_path)
    git(tmp_path, "tag", "v1")
    refuse_unfit_tree(tmp_path)
    (tmp_path / "file").write_text("2")
    with pytest.raises(Unusable, match="uncommitted changes"):
        refuse_unfit_tree(tmp_path)
