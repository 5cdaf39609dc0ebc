"""Several sample files scored together: one calibration, results stored beside the samples, used again only where they fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dylo_moe.errors import SampleFileError, ScoringError, TaskSetError
from dylo_moe.evaluation import score_files
from dylo_moe.scoring import Limits
from dylo_moe.tasks import load_tasks
from harness.specimens.tasks import TASKS, write_records, write_task_set

THREE = TASKS[:3]
LIMITS = Limits()


@pytest.fixture
def task_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", THREE)))
    return load_tasks("humaneval")


def sample_file(path: Path, right: set[int]) -> Path:
    """One sample of each task, right for the given places."""
    with path.open("w") as file:
        for place, task in enumerate(THREE):
            body = task.completion("humaneval", None if place in right else task.wrong[0])
            file.write(json.dumps({"task_id": task.task_id("humaneval"), "solution": task.prompt("humaneval") + body}) + "\n")
    return path


@pytest.fixture
def files(tmp_path):
    return {"weak": sample_file(tmp_path / "weak.jsonl", {0}), "strong": sample_file(tmp_path / "strong.jsonl", {0, 1, 2})}


def test_stored_results_are_used_again_and_those_of_other_samples_tasks_or_limits_are_not(task_set, files):
    first = score_files(files, task_set, task_set.ids(), LIMITS)
    assert {name: result["pass@1"] for name, result in first.items()} == {"weak": pytest.approx(1 / 3), "strong": 1.0}
    stores = {name: path.with_name(f"{path.stem}_eval_results.json") for name, path in files.items()}
    for name, store in stores.items():
        assert json.loads(store.read_text()) == first[name]
        store.write_text(json.dumps({**json.loads(store.read_text()), "mark": 1}))
    assert all("mark" in result for result in score_files(files, task_set, task_set.ids(), LIMITS).values())
    sample_file(files["weak"], {1, 2})
    changed = score_files(files, task_set, task_set.ids(), LIMITS)
    assert "mark" in changed["strong"] and "mark" not in changed["weak"]
    assert changed["weak"]["pass@1"] == pytest.approx(2 / 3)
    files.pop("strong")
    part = score_files(files, task_set, task_set.ids()[:1], Limits(base_only=True))["weak"]
    assert (part["tasks"], part["pass@1"], part["plus"]) == (1, 0.0, None)


def test_nothing_is_scored_or_stored_where_a_canonical_solution_fails(task_set, files, tmp_path, monkeypatch):
    records = [json.loads(line) for line in task_set.path.read_text().splitlines()]
    records[1] = {**records[1], "canonical_solution": "    return undefined\n"}
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_records(tmp_path / "broken.jsonl", records)))
    broken = load_tasks("humaneval")
    with pytest.raises(ScoringError, match="HumanEval/1"):
        score_files(files, broken, broken.ids(), LIMITS)
    assert not list(tmp_path.glob("*_eval_results.json"))


def test_task_without_a_sample_is_named(task_set, files):
    lines = files["weak"].read_text().splitlines()
    files["weak"].write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(TaskSetError, match=f"no samples for 1 of 3 tasks: {THREE[2].task_id('humaneval')}"):
        score_files(files, task_set, task_set.ids(), LIMITS)


def test_missing_file_is_named(task_set, tmp_path):
    with pytest.raises(SampleFileError, match=r"nowhere\.jsonl"):
        score_files({"x": tmp_path / "nowhere.jsonl"}, task_set, task_set.ids(), LIMITS)
