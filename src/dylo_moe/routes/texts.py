"""What the router is shown: prompts of a task set or lines of a file, with completions where there are any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dylo_moe.errors import SampleFileError, TaskSetError, one_line


@dataclass(frozen=True)
class Text:
    """task: what it belongs to, shared by the samples of one task. prompt: as a task set or a file gives it."""

    task: str
    prompt: str
    completion: str = ""


def task_texts(tasks: Mapping[str, Mapping[str, Any]], max_samples: int | None = None) -> list[Text]:
    """The prompts of a task set as EvalPlus gives them to a decoder, the first `max_samples` of them."""
    chosen = list(tasks.items())[:max_samples]
    return [Text(task_id, task["prompt"].strip() + "\n") for task_id, task in chosen]


def file_texts(path: str | Path, max_samples: int | None = None) -> list[Text]:
    """The lines of a file. In a .jsonl file each is a JSON text, or an object with `text` (or `prompt`), and perhaps `completion`
    and a name (`task_id` or `name`); in any other file each line is a text. Texts without a name are called line 1, line 2 ...

    Raises:
        TaskSetError: a line that cannot be used, or none at all. OSError: the file cannot be read.
    """
    path = Path(path)
    as_json = path.suffix == ".jsonl"
    texts = []
    for number, line in _lines(path, TaskSetError):
        texts.append(_from_json(path, number, line) if as_json else Text(f"line {number}", line))
        if len(texts) == max_samples:
            break
    if not texts:
        raise TaskSetError(f"{path}: no texts")
    return texts


def with_samples(texts: Sequence[Text], path: str | Path) -> list[Text]:
    """The same prompts with the completions of a sample file, one text per sample; tasks without a sample keep the bare prompt.

    path: JSON lines with `task_id` and `solution` (which may begin with the prompt) or `completion`, as EvalPlus takes them.
        What the model wrote is in the files STEM.raw.jsonl: the router never saw a sanitized solution in this form.

    Raises:
        SampleFileError: a line that is no sample, or samples of none of the tasks. OSError: the file cannot be read.
    """
    path = Path(path)
    prompts = {text.task: text.prompt for text in texts}
    found: dict[str, list[str]] = {}
    for number, line in _lines(path, SampleFileError):
        task, field, content = _sample(path, number, line)
        found.setdefault(task, []).append(content.removeprefix(prompts.get(task, "")) if field == "solution" else content)
    if not found.keys() & prompts.keys():
        raise SampleFileError(
            f"{path}: samples of {one_line(', '.join(list(found)[:3])) or 'no task'}, but of none of the tasks here"
        )
    return [replace(t, completion=completion) for t in texts for completion in found.get(t.task, [""])]


def texts_hash(texts: Iterable[Text]) -> str:
    """SHA-256 of everything that the texts hold, in their order."""
    content = json.dumps([[text.task, text.prompt, text.completion] for text in texts])
    return hashlib.sha256(content.encode()).hexdigest()


def _sample(path: Path, number: int, line: str) -> tuple[str, str, str]:
    """Task id, the field that holds the text, and the text."""
    record = _parsed(path, number, line, SampleFileError)
    if isinstance(record, dict) and isinstance(record.get("task_id"), str):
        for name in ("solution", "completion"):
            if isinstance(record.get(name), str):
                return record["task_id"], name, record[name]
    raise SampleFileError(f"{path}:{number}: no sample: expected task_id, and solution or completion, as texts")


def _from_json(path: Path, number: int, line: str) -> Text:
    record = _parsed(path, number, line, TaskSetError)
    record = {"text": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise TaskSetError(f"{path}:{number}: found {type(record).__name__}, expected a text or an object with a text")
    prompt = record.get("text", record.get("prompt"))
    name, completion = record.get("task_id", record.get("name", f"line {number}")), record.get("completion", "")
    if not all(isinstance(value, str) for value in (prompt, name, completion)):
        raise TaskSetError(f"{path}:{number}: text (or prompt), task_id (or name) and completion should be texts")
    return Text(name, prompt, completion)


def _parsed(path: Path, number: int, line: str, error: type[Exception]) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}:{number}: not JSON: {problem}") from None
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{path}:{number}: half of a surrogate pair, which is no text") from None
    return record


def _lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, str]]:
    """Number and text of every line that holds more than space; only line feeds end a line."""
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8: {problem}") from None
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")
