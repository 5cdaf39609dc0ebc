"""The task set: HumanEval+ or MBPP+ as EvalPlus publishes it, or the user's file in the same form."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

from dylo_moe.errors import OptionError, TaskSetError

OVERRIDES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
_RELEASES = {"humaneval": ("HumanEvalPlus", "v0.1.10"), "mbpp": ("MbppPlus", "v0.2.0")}
_TEXTS = ("task_id", "prompt", "entry_point", "canonical_solution")
_LISTS = ("base_input", "plus_input")


@dataclass(frozen=True)
class TaskSet:
    """Tasks in the order of their file.

    Attributes:
        dataset: "humaneval" or "mbpp".
        tasks: task id -> the line of the file; inputs are JSON values (MBPP's are turned into tuples and sets where they run).
        hash: SHA-256 of the file's content, unpacked.
        stock_hash: what EvalPlus calls the hash, MD5 of the file as it lies there.
        path: the file.
    """

    dataset: str
    tasks: Mapping[str, Mapping[str, Any]]
    hash: str
    stock_hash: str
    path: Path

    def ids(self, id_range: tuple[int, int] | None = None) -> list[str]:
        """Task ids whose number is in [low, high), or all of them.

        Raises:
            TaskSetError: the range holds none.
        """
        low, high = id_range or (0, 0)
        chosen = [task for task in self.tasks if id_range is None or low <= int(task.split("/")[1]) < high]
        if not chosen:
            raise TaskSetError(f"{self.path}: no task has a number in [{low}, {high})")
        return chosen

    def part(self, ids: Iterable[str]) -> TaskSet:
        """The same file with these tasks only; samples of the part are samples of the whole."""
        return replace(self, tasks={task: self.tasks[task] for task in ids})


def load_tasks(dataset: str, *, version: str = "default", mini: bool = False, noextreme: bool = False) -> TaskSet:
    """Reads the file that HUMANEVAL_OVERRIDE_PATH or MBPP_OVERRIDE_PATH names now, else EvalPlus's release (which it downloads).

    Raises:
        OptionError: an unknown dataset or combination of options.
        TaskSetError: the file cannot be had, or a line of it cannot be used.
    """
    if dataset not in OVERRIDES:
        raise OptionError(f"dataset {dataset!r}, but should be 'humaneval' or 'mbpp'")
    if mini and (noextreme or dataset == "mbpp"):
        raise OptionError("mini goes neither with noextreme nor with mbpp")
    override = os.environ.get(OVERRIDES[dataset])
    path = Path(override) if override else _release(dataset, version, mini, noextreme)
    try:
        packed = path.read_bytes()
        content = gzip.decompress(packed) if path.name.endswith(".gz") else packed
    except (OSError, EOFError, zlib.error) as error:
        raise TaskSetError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    tasks = _parse(path, content)
    return TaskSet(dataset, tasks, hashlib.sha256(content).hexdigest(), hashlib.md5(packed).hexdigest(), path)


def _release(dataset: str, version: str, mini: bool, noextreme: bool) -> Path:
    from evalplus.data.utils import get_dataset_metadata, make_cache

    name, newest = _RELEASES[dataset]
    url, path = get_dataset_metadata(name, newest if version == "default" else version, mini, noextreme)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it says what it downloads, and stdout is for results
            make_cache(url, path)
    except (URLError, OSError) as error:
        raise TaskSetError(f"{url}: {error}; or set {OVERRIDES[dataset]} to a local copy") from None
    return Path(path)


def _parse(path: Path, content: bytes) -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskSetError(f"{path}:{number}: not JSON: {error}") from None
        problem = _problem(task)
        if problem is None and task["task_id"] in tasks:
            problem = f"{task['task_id']} for the second time"
        if problem:
            raise TaskSetError(f"{path}:{number}: {problem}")
        tasks[task["task_id"]] = task
    if not tasks:
        raise TaskSetError(f"{path}: no tasks")
    return tasks


def _problem(task: Any) -> str | None:
    """What is wrong with one line of a task file, or None."""
    if not isinstance(task, dict):
        return "not an object"
    for name in _TEXTS:
        if not isinstance(task.get(name), str):
            return f"{name} is not a text"
    for name in _LISTS:
        inputs = task.get(name)
        if inputs == {}:  # Mbpp/793 of the published file, where no inputs are meant
            continue
        if not (isinstance(inputs, list) and all(isinstance(arguments, list) for arguments in inputs)):
            return f"{name} is not a list of lists of arguments"
    if not task["base_input"]:
        return "base_input is empty, so that every solution would pass"
    if not isinstance(task.get("atol"), int | float) or isinstance(task["atol"], bool) or not 0 <= task["atol"] < math.inf:
        return "atol is not a number, or below 0, or not finite"
    if not re.fullmatch(r"[A-Za-z]+/[0-9]{1,9}", task["task_id"]):
        return f"task_id {task['task_id']!r}, but should be like 'HumanEval/0'"
    return None
