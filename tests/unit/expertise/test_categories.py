"""Categories come from the user's file, else the task file, and are never made up."""

import json

import pytest

from dylo_moe.errors import TaskSetError
from dylo_moe.expertise.categories import ALL, WITHOUT, categorise

TASKS = {f"HumanEval/{number}": {"prompt": ""} for number in range(3)}


def test_tasks_without_categories_are_one_and_it_is_said():
    found = categorise(TASKS)
    assert (found.names, found.source) == ([ALL], "none")
    assert found.tasks(ALL) == list(TASKS)
    assert "no categories" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"category": "text"}, ["text"]),
        ({"categories": ["text", "numbers"]}, ["text", "numbers"]),
        ({"tags": ["text", "text"], "category": "old"}, ["old", "text"]),
    ],
)
def test_fields_of_the_task_file_are_used(fields, names):
    found = categorise({**TASKS, "HumanEval/3": fields})
    assert found.names == [*names, WITHOUT]
    assert found.tasks(names[0]) == ["HumanEval/3"]
    assert "3 of 4 tasks have no category" in found.notes[0]


@pytest.mark.parametrize("field", [3, [], [1], {"a": "b"}, "", None])
def test_field_that_is_no_category_is_refused(field):
    if field == []:
        assert categorise({**TASKS, "HumanEval/3": {"tags": field}}).names == [ALL]
        return
    with pytest.raises(TaskSetError, match="HumanEval/3: category: found .* expected a category"):
        categorise({**TASKS, "HumanEval/3": {"category": field}})


FILES = {
    "a.json": json.dumps({"HumanEval/0": "text", "HumanEval/1": ["text", "numbers"], "Mbpp/1": "other"}),
    "a.csv": "task_id,category\nHumanEval/0,text\nHumanEval/1, text\n\nHumanEval/1,numbers\nMbpp/1,other\n",
    "bare.csv": "\ufeffHumanEval/0,text\nHumanEval/1,text\nHumanEval/1,numbers\n",
}


@pytest.mark.parametrize("name", FILES)
def test_file_wins_over_the_task_file(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    found = categorise({task: {"category": "never"} for task in TASKS}, tmp_path / name)
    assert found.of == {"HumanEval/0": ("text",), "HumanEval/1": ("text", "numbers"), "HumanEval/2": (WITHOUT,)}
    assert found.source == str(tmp_path / name)
    assert found.tasks("text") == ["HumanEval/0", "HumanEval/1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[]", "found a list, expected an object"),
        ("a.json", '{"HumanEval/0": 3}', "HumanEval/0: found 3"),
        ("a.json", '{"Human/0": "text"}', "none of its 1 task ids is one of the 3 tasks"),
        ("a.csv", "task_id,category\n", "none of its 0 task ids"),
        ("a.csv", "HumanEval/0\n", ":1: found .* expected two columns"),
        ("a.csv", "HumanEval/0,a,b\n", "expected two columns"),
        ("a.csv", "HumanEval/0,\n", "expected two columns"),
    ],
)
def test_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskSetError, match=message) as caught:
        categorise(TASKS, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TaskSetError, match="No such file"):
        categorise(TASKS, tmp_path / "a.json")
