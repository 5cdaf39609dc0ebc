"""The task set: EvalPlus reads it, right solutions pass, plausible wrong ones fail."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.specimens.scoring import score
from harness.specimens.tasks import CATEGORIES, DATASETS, TASKS, write_records, write_task_set

READ_WITH_EVALPLUS = """
import json
from evalplus.data import get_human_eval_plus, get_mbpp_plus
print(json.dumps({"humaneval": get_human_eval_plus, "mbpp": get_mbpp_plus}["%s"]()))
"""


def run_namespace(program: str) -> dict:
    namespace: dict = {}
    exec(program, namespace)
    return namespace


def test_three_categories_have_six_tasks_each_and_no_two_share_a_name():
    assert {name: sum(task.category == name for task in TASKS) for name in CATEGORIES} == dict.fromkeys(CATEGORIES, 6)
    assert len({task.name for task in TASKS}) == 18


@pytest.mark.parametrize("dataset", DATASETS)
def test_evalplus_reads_every_task_unchanged_from_the_override_path(tmp_path, dataset):
    path = write_task_set(tmp_path, dataset)
    environment = {**os.environ, f"{dataset.upper()}_OVERRIDE_PATH": str(path)}
    output = subprocess.run(
        [sys.executable, "-c", READ_WITH_EVALPLUS % dataset], env=environment, capture_output=True, text=True, check=True
    ).stdout
    read = json.loads(output.splitlines()[-1])
    assert read == {task.task_id(dataset): task.record(dataset) for task in TASKS}


@pytest.mark.parametrize("dataset", DATASETS)
def test_canonical_solutions_pass_in_evalplus(dataset):
    records = [task.record(dataset) for task in TASKS]
    solutions = {record["task_id"]: record["prompt"] + record["canonical_solution"] for record in records}
    assert score(dataset, records, solutions) == dict.fromkeys(solutions, True)


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("dataset", DATASETS)
def test_plausible_wrong_solutions_fail_in_evalplus(dataset, variant):
    records = [task.record(dataset) for task in TASKS]
    solutions = {task.task_id(dataset): task.prompt(dataset) + task.completion(dataset, task.wrong[variant]) for task in TASKS}
    assert score(dataset, records, solutions) == dict.fromkeys(solutions, False)


def test_base_inputs_alone_miss_some_wrong_solutions_that_plus_inputs_catch():
    """Otherwise a scorer that forgets the plus inputs would give the same scores."""
    records = [replace(task, plus=[]).record("humaneval") for task in TASKS]
    for variant in (0, 1):
        solutions = {task.task_id("humaneval"): task.prompt("humaneval") + task.wrong[variant] for task in TASKS}
        assert any(score("humaneval", records, solutions).values())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_example_in_the_prompt_is_true(task):
    namespace = run_namespace(task.prompt("humaneval") + task.body)
    assert eval(task.call, namespace) == eval(task.result)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_inputs_meet_the_contract(task):
    names = [parameter.partition(":")[0] for parameter in task.signature[1:].partition(") ->")[0].split(", ")]
    for arguments in (*task.base, *task.plus):
        values = dict(zip(names, arguments, strict=True))
        assert all(eval(condition, dict(values)) for condition in task.conditions()), arguments


def test_gzipped_task_file_holds_the_same_lines_and_is_reproducible(tmp_path):
    records = [task.record("mbpp") for task in TASKS[:2]]
    plain, packed = write_records(tmp_path / "a.jsonl", records), write_records(tmp_path / "a.jsonl.gz", records)
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert packed.read_bytes() == write_records(tmp_path / "b.jsonl.gz", records).read_bytes()
