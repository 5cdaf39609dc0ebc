"""Texts from files and samples, and how tokens are made visible; a mistake is one line with file and line."""

from __future__ import annotations

import json

import pytest

from dylo_moe.errors import SampleFileError, TaskSetError
from dylo_moe.routes.texts import Text, file_texts, task_texts, texts_hash, with_samples
from dylo_moe.routes.tokens import visible

TASKS = {"HumanEval/0": {"prompt": "\ndef a():\n"}, "HumanEval/1": {"prompt": "def b():"}}


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_prompts_are_those_that_a_decoder_gets():
    assert task_texts(TASKS) == [Text("HumanEval/0", "def a():\n"), Text("HumanEval/1", "def b():\n")]
    assert len(task_texts(TASKS, 1)) == 1


def test_plain_lines_are_texts_and_only_line_feeds_end_them(tmp_path):
    path = written(tmp_path / "a.txt", "one\x0cstill one", "", "three {")
    assert file_texts(path) == [Text("line 1", "one\x0cstill one"), Text("line 3", "three {")]
    assert file_texts(path, 1) == [Text("line 1", "one\x0cstill one")]


def test_json_lines_are_texts_with_names_and_completions(tmp_path):
    path = written(tmp_path / "a.jsonl", '"just text"', {"text": "x", "task_id": "t"}, {"prompt": "p", "completion": "c"})
    assert file_texts(path) == [Text("line 1", "just text"), Text("t", "x"), Text("line 3", "p", "c")]


@pytest.mark.parametrize(
    "line", ["{", "3", '{"text": 3}', '{"completion": "x"}', '{"text": "x", "name": 4}', '"\\ud800"', "[" * 100_000]
)
def test_line_that_is_no_text_is_refused_by_its_number(tmp_path, line):
    path = written(tmp_path / "a.jsonl", '"fine"', line)
    with pytest.raises(TaskSetError, match=r"a\.jsonl:2: ") as error:
        file_texts(path)
    assert "\n" not in str(error.value)


def test_file_without_texts_or_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(TaskSetError, match="no texts"):
        file_texts(written(tmp_path / "a.txt", "", " "))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TaskSetError, match="not UTF-8"):
        file_texts(tmp_path / "b.txt")


def test_samples_follow_their_prompts_and_tasks_without_one_keep_the_bare_prompt(tmp_path):
    samples = written(
        tmp_path / "s.jsonl",
        {"task_id": "HumanEval/1", "solution": "def b():\n    return 1"},
        {"task_id": "HumanEval/1", "completion": "def b():\n    again"},
        {"task_id": "HumanEval/9", "solution": "elsewhere"},
    )
    assert with_samples(task_texts(TASKS), samples) == [
        Text("HumanEval/0", "def a():\n"),
        Text("HumanEval/1", "def b():\n", "    return 1"),
        Text("HumanEval/1", "def b():\n", "def b():\n    again"),
    ]


def test_samples_of_other_tasks_and_lines_that_are_none_are_refused(tmp_path):
    with pytest.raises(SampleFileError, match="samples of Mbpp/2, but of none of the tasks here"):
        with_samples(task_texts(TASKS), written(tmp_path / "a.jsonl", {"task_id": "Mbpp/2", "solution": ""}))
    with pytest.raises(SampleFileError, match=r"b\.jsonl:1: no sample"):
        with_samples(task_texts(TASKS), written(tmp_path / "b.jsonl", {"task_id": "HumanEval/1"}))


def test_hash_tells_prompt_from_completion():
    assert texts_hash([Text("a", "bc")]) != texts_hash([Text("a", "b", "c")])


def test_what_has_no_picture_is_visible():
    assert visible(" a\n\t") == "·a⏎\n⇥"
    assert visible("\x1b[31m\u202eevil\x00") == "\\x1b[31m\\u202eevil\\x00"
    assert visible("") == "∅" and visible("<b>") == "<b>"
