"""What a sample journal holds, line by line, and how it is read.

{"identity": ..., "shard": "1/4"}     the first line; "shard" only where the journal is a part of a run
{"task_id", "index", ...}             a sample; the samples of a task may come in any order of index
{"plan": ...}                         only in a shard, when it is finished: the run that it is a part of
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dylo_moe.errors import OptionError, SampleFileError
from dylo_moe.journal_lines import START_ANEW, checked_line, whole_lines


@dataclass(frozen=True)
class Record:
    """One sample. index counts a task's samples from 0; note is empty, or says why `solution` is not sanitized."""

    task_id: str
    index: int
    solution: str
    raw: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run makes: `n_samples` of each task in `chosen`. order: every task of the data set, in the order of its file."""

    order: tuple[str, ...]
    chosen: tuple[str, ...]
    n_samples: int
    versions: Mapping[str, str]

    def part(self, shard: tuple[int, int] | None) -> tuple[str, ...]:
        """The chosen tasks of shard (i, n), 0 <= i < n: those whose position is i modulo n. None for all of them."""
        return self.chosen if shard is None else self.chosen[shard[0] :: shard[1]]


@dataclass
class Content:
    """A journal's content so far.

    Attributes:
        identity: of the run.
        shard: (i, n) with 0 <= i < n, or None for a whole run.
        records: task id -> index -> sample.
        plan: None where the journal is no shard, or an unfinished one.
    """

    identity: dict[str, Any]
    shard: tuple[int, int] | None = None
    records: dict[str, dict[int, Record]] = field(default_factory=dict)
    plan: Plan | None = None

    def header(self) -> bytes:
        """The first line."""
        return checked_line({"identity": self.identity} | ({} if self.shard is None else {"shard": shard_text(self.shard)}))

    def add(self, record: Record, path: Path) -> None:
        """Takes a sample in.

        Raises:
            SampleFileError: there is one of this task and index.
        """
        of_task = self.records.setdefault(record.task_id, {})
        if record.index in of_task:
            raise SampleFileError(f"{path}: sample {record.index} of {record.task_id} for the second time")
        of_task[record.index] = record

    def missing(self, task_id: str, n_samples: int) -> list[int]:
        """The indices below `n_samples` that are not there, in order."""
        have = self.records.get(task_id, {})
        return [index for index in range(n_samples) if index not in have]


def parse_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (0, 4).

    Raises:
        OptionError: not two numbers, or not one of 1/n ... n/n.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(f"shard {text!r}, but should be one of 1/4, 2/4, 3/4, 4/4, or so")
    return int(found[1]) - 1, int(found[2])


def shard_text(shard: tuple[int, int]) -> str:
    """(0, 4) -> "1/4", as people write it."""
    return f"{shard[0] + 1}/{shard[1]}"


def shard_name(shard: tuple[int, int] | None) -> str:
    """(0, 4) -> ".shard-1-of-4", what a shard's file names have behind their stem; nothing for a whole run."""
    return "" if shard is None else f".shard-{shard[0] + 1}-of-{shard[1]}"


def plan_line(plan: Plan) -> bytes:
    return checked_line({"plan": asdict(plan)})


def read_journal(path: Path) -> tuple[Content | None, int]:
    """What a journal holds and how many of its bytes are whole lines; None where not even the first line is whole.

    Raises:
        SampleFileError: damage anywhere but at the end, a sample twice, or lines of another version.
        OSError: the file cannot be read.
    """
    payloads, good = whole_lines(path.read_bytes(), path)
    if not payloads:
        return None, 0
    try:
        content = Content(payloads[0]["identity"], parse_shard(payloads[0]["shard"]) if "shard" in payloads[0] else None)
        for payload in payloads[1:]:
            if "plan" in payload:
                content.plan = _plan(**payload["plan"])
            else:
                content.add(Record(**payload), path)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, SampleFileError):
            raise
        raise SampleFileError(f"{path}: written by another version; {START_ANEW}") from None
    return content, good


def _plan(order: list[str], chosen: list[str], n_samples: int, versions: dict[str, str]) -> Plan:
    return Plan(tuple(order), tuple(chosen), n_samples, versions)
