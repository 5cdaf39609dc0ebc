"""The samples of one run on disk: a journal that survives being killed, and the files that EvalPlus reads.

Beside each other in one directory, with one stem that ends in the hash of the run's identity:

    STEM.journal      one line per sample, "<checksum> <JSON>"; the first line is the identity; only ever appended to
    STEM.jsonl        {"task_id", "solution"}, sanitized: what EvalPlus's `evaluate` takes
    STEM.raw.jsonl    the same before sanitizing
    STEM.json         the identity, versions, and notes on samples
    STEM.lock         held while somebody writes

The last four are made from the journal, each in one step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dylo_moe.atomic import flush_to_disk, write_atomically
from dylo_moe.errors import SampleFileError
from dylo_moe.identity import identity_hash

_LABEL_LENGTH = 80
_CHECKSUM_LENGTH = 16


@dataclass(frozen=True)
class Record:
    """One sample. index counts a task's samples from 0; note is empty, or says why `solution` is not sanitized."""

    task_id: str
    index: int
    solution: str
    raw: str
    note: str = ""


def sample_stem(label: str, parts: Iterable[str], identity: dict[str, Any]) -> str:
    """A file name's stem: what a reader wants to see, then what makes it unique."""
    readable = "_".join([label[-_LABEL_LENGTH:], *parts])
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", readable).strip("-._")
    return f"{safe}-{identity_hash(identity)[:12]}"


class SampleJournal:
    """The samples of one identity, open for writing by this process alone. Use as a context manager.

    Args:
        directory: created if it does not exist.
        stem: from `sample_stem`.
        identity: of the run; a journal of another identity is refused.
        resume: False forgets what is there.

    Raises:
        SampleFileError: another process is writing; another identity; damage anywhere but at the end.
    """

    def __init__(self, directory: Path, stem: str, identity: dict[str, Any], *, resume: bool = True) -> None:
        self.path = directory / f"{stem}.journal"
        self.jsonl = directory / f"{stem}.jsonl"
        self.raw_jsonl = directory / f"{stem}.raw.jsonl"
        self.manifest = directory / f"{stem}.json"
        self.identity = identity
        self.resume = resume
        self.records: dict[str, list[Record]] = {}
        self._lock = FileLock(directory / f"{stem}.lock")

    def __enter__(self) -> SampleJournal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SampleFileError(f"{self.path}: another process is writing these samples; wait for it to end") from None
        try:
            if not (self.resume and self.path.exists() and self._read()):
                write_atomically(self.path, _line({"identity": self.identity}))
            self._file = self.path.open("ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def count(self, task_id: str) -> int:
        """How many samples of a task there are."""
        return len(self.records.get(task_id, ()))

    def append(self, records: Iterable[Record]) -> None:
        """Adds samples of one task and returns when they are on the disk.

        Raises:
            SampleFileError: an index that is not the next one.
        """
        records = list(records)
        for record in records:
            self._remember(record)
        self._file.write(b"".join(_line(asdict(record)) for record in records))
        self._file.flush()
        flush_to_disk(self._file.fileno())

    def export(self, task_order: Iterable[str], n_samples: int, versions: dict[str, str]) -> Path:
        """Writes the files made from the journal: at most `n_samples` of each task, tasks in the given order.

        Returns:
            The path of STEM.jsonl.
        """
        chosen = [record for task in task_order for record in self.records.get(task, ())[:n_samples]]
        about = {"identity": self.identity, "n_samples": n_samples, "versions": versions}
        notes = [{"task_id": r.task_id, "index": r.index, "note": r.note} for r in chosen if r.note]
        write_atomically(self.raw_jsonl, _jsonl((r.task_id, r.raw) for r in chosen))
        write_atomically(self.manifest, json.dumps({**about, "notes": notes}, indent=1, sort_keys=True).encode() + b"\n")
        write_atomically(self.jsonl, _jsonl((r.task_id, r.solution) for r in chosen))
        return self.jsonl

    def _remember(self, record: Record) -> None:
        if record.index != self.count(record.task_id):
            raise SampleFileError(
                f"{self.path}: sample {record.index} of {record.task_id} after {self.count(record.task_id)} samples"
            )
        self.records.setdefault(record.task_id, []).append(record)

    def _read(self) -> bool:
        """Reads the journal and cuts off a torn end; False if not even the identity is whole."""
        content = self.path.read_bytes()
        payloads, good = _whole_lines(content, self.path)
        if not payloads:
            return False
        if payloads[0] != {"identity": self.identity}:
            raise SampleFileError(f"{self.path}: samples of another run; move it away, or use resume=False")
        for payload in payloads[1:]:
            self._remember(_record(payload, self.path))
        if good < len(content):
            with self.path.open("r+b") as file:
                file.truncate(good)
                flush_to_disk(file.fileno())
        return True


def _line(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, sort_keys=True).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_CHECKSUM_LENGTH].encode()


def _jsonl(pairs: Iterable[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"task_id": task, "solution": text}) + "\n" for task, text in pairs).encode()


def _whole_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first one that is not whole, and how many bytes they take.

    Raises:
        SampleFileError: a whole line follows a broken one, which no interrupted write leaves behind.
    """
    payloads: list[dict[str, Any]] = []
    good, broken = 0, False
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not (line.endswith(b"\n") and checksum == _checksum(text)):
            broken = True
        elif broken:
            raise SampleFileError(f"{path}: damaged after {len(payloads)} lines; move it away, or use resume=False")
        else:
            payloads.append(json.loads(text))
            good += len(line)
    return payloads, good


def _record(payload: dict[str, Any], path: Path) -> Record:
    try:
        return Record(**payload)
    except TypeError:
        raise SampleFileError(f"{path}: written by another version; move it away, or use resume=False") from None
