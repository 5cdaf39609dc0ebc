"""Programming tasks with a known answer, in EvalPlus's two formats.

Three categories of six tasks each, written for this project (none is from HumanEval or MBPP), so that an expert can
know one category and not the others. `Task.record(dataset)` is one line of an EvalPlus task file; `write_task_set`
writes all of them to a file for `HUMANEVAL_OVERRIDE_PATH` or `MBPP_OVERRIDE_PATH`. EvalPlus reads those variables at
import only: set them before its first import, in a fresh process.
"""

import gzip
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DATASETS = ("humaneval", "mbpp")
CATEGORIES = ("strings", "numbers", "lists")
# EvalPlus turns lists into tuples for some MBPP numbers below 810 (evalplus/data/mbpp.py); ours are clear of them.
FIRST_NUMBER = {"humaneval": 0, "mbpp": 1000}
TASK_PREFIX = {"humaneval": "HumanEval", "mbpp": "Mbpp"}
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Task:
    """One task. `body` and `wrong` are indented function bodies that end with a newline; an input is a list."""

    number: int
    category: str
    name: str
    signature: str
    summary: str
    call: str
    result: str
    body: str
    wrong: tuple[str, ...]
    base: list
    plus: list
    contract: str
    atol: float

    def task_id(self, dataset: str) -> str:
        return f"{TASK_PREFIX[dataset]}/{FIRST_NUMBER[dataset] + self.number}"

    def prompt(self, dataset: str) -> str:
        """The text given to the model: signature and docstring (humaneval), or docstring with one assert (mbpp)."""
        if dataset == "humaneval":
            docstring = f'"""{self.summary}\n    >>> {self.call}\n    {self.result}\n    """'
            return f"def {self.name}{self.signature}:\n    {docstring}\n"
        return f'"""\n{self.summary}\nassert {self.call} == {self.result}\n"""\n'

    def completion(self, dataset: str, body: str | None = None) -> str:
        """What a model has to write after the prompt; `body` in place of the right one gives a wrong answer."""
        body = self.body if body is None else body
        return body if dataset == "humaneval" else f"def {self.name}{self.signature}:\n{body}"

    def record(self, dataset: str) -> dict:
        """One line of EvalPlus's task file."""
        return {
            "task_id": self.task_id(dataset),
            "prompt": self.prompt(dataset),
            "entry_point": self.name,
            "canonical_solution": self.completion(dataset),
            "contract": "".join(f'    assert {c}, "invalid inputs" # $_CONTRACT_$\n' for c in self.conditions()),
            "base_input": self.base,
            "plus_input": self.plus,
            "atol": self.atol,
        }

    def conditions(self) -> list[str]:
        """What holds of every legal input, one Python expression each."""
        types = re.findall(r"(\w+): (\w+)", self.signature.partition("->")[0])
        return [f"isinstance({name}, {kind})" for name, kind in types] + ([self.contract] if self.contract else [])


def _read(category: str, first: int) -> list[Task]:
    entries = tomllib.loads((DATA / f"{category}.toml").read_text(encoding="utf-8"))["task"]
    return [_task(entry, category, first + i) for i, entry in enumerate(entries)]


def _task(entry: dict, category: str, number: int) -> Task:
    optional = {"contract": entry.get("contract", ""), "atol": entry.get("atol", 0)}
    return Task(number=number, category=category, **{**entry, **optional, "wrong": tuple(entry["wrong"])})


def _read_all() -> tuple[Task, ...]:
    tasks: list[Task] = []
    for category in CATEGORIES:
        tasks += _read(category, len(tasks))
    return tuple(tasks)


TASKS: tuple[Task, ...] = _read_all()


def write_records(path: Path, records: Iterable[dict]) -> Path:
    """Write JSON lines to `path`, gzipped if its name ends in .gz; the same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_task_set(directory: Path, dataset: str, tasks: Iterable[Task] = TASKS) -> Path:
    """Write `tasks` as an EvalPlus task file for `dataset` ("humaneval" or "mbpp") and return its path."""
    return write_records(Path(directory) / f"{dataset}.jsonl", (task.record(dataset) for task in tasks))
