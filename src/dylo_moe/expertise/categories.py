"""Categories of tasks: from the user's file, else from the task file, else one for all. None is ever made up."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylo_moe.errors import TaskSetError, one_line

FIELDS = ("category", "categories", "tags")
ALL = "all"
WITHOUT = "(no category)"
NO_CATEGORIES = "the task file has no categories (fields " + ", ".join(FIELDS) + "), so all tasks are one; name some by a file"


@dataclass(frozen=True)
class Categories:
    """of: task id -> its categories, at least one each. source: where they come from. notes: what to know, one line each."""

    of: Mapping[str, tuple[str, ...]]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every category once, in the order of the tasks; tasks without one last."""
        found = dict.fromkeys(name for names in self.of.values() for name in names)
        return sorted(found, key=lambda name: name == WITHOUT)

    def tasks(self, category: str) -> list[str]:
        return [task for task, names in self.of.items() if category in names]


def categorise(tasks: Mapping[str, Mapping[str, Any]], file: str | Path | None = None) -> Categories:
    """The categories of tasks; a task may have several and then counts in each.

    Args:
        tasks: task id -> its line of the task file.
        file: JSON {task id: category or list of categories}, or CSV with the columns task_id, category (one line per category of
            a task). It may name tasks that are not here.

    Raises:
        TaskSetError: a file that cannot be read, or that names none of the tasks; a category that is no text.
    """
    if file is None:
        return _from_tasks(tasks)
    path = Path(file)
    read = _from_csv if path.suffix.lower() == ".csv" else _from_json
    try:
        found = read(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskSetError(one_line(f"{path}: {getattr(error, 'strerror', None) or error}")) from None
    known = {task: found[task] for task in tasks if found.get(task)}
    if not known:
        raise TaskSetError(
            f"{path}: none of its {len(found)} task ids is one of the {len(tasks)} tasks, such as {next(iter(tasks))}"
        )
    return _complete(tasks, known, str(path))


def _from_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Categories:
    known: dict[str, tuple[str, ...]] = {}
    for task_id, task in tasks.items():
        names = [name for field in FIELDS if field in task for name in _names(task[field], f"{task_id}: {field}")]
        if names:
            known[task_id] = tuple(dict.fromkeys(names))
    if not known:
        return Categories(dict.fromkeys(tasks, (ALL,)), "none", (NO_CATEGORIES,))
    return _complete(tasks, known, "task file")


def _complete(tasks: Iterable[str], known: Mapping[str, tuple[str, ...]], source: str) -> Categories:
    of = {task: known.get(task, (WITHOUT,)) for task in tasks}
    lost = [task for task in of if task not in known]
    note = (f"{len(lost)} of {len(of)} tasks have no category in {source}: {', '.join(lost[:5])}",) if lost else ()
    return Categories(of, source, note)


def _from_json(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TaskSetError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TaskSetError(
            f"{path}: found a {type(found).__name__}, expected an object {{task id: category or list of categories}}"
        )
    return {task: tuple(dict.fromkeys(_names(value, f"{path}: {task}"))) for task, value in found.items()}


def _from_csv(path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or cells[0] == "task_id":
                continue
            if len(cells) != 2 or not all(cells):
                raise TaskSetError(one_line(f"{path}:{reader.line_num}: found {row}, expected two columns: task_id, category"))
            found[cells[0]] = tuple(dict.fromkeys((*found.get(cells[0], ()), cells[1])))
    return found


def _names(value: Any, where: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise TaskSetError(one_line(f"{where}: found {value!r}, expected a category or a list of categories"))
    return [name.strip() for name in names]
