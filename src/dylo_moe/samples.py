"""The samples of one run on disk: a journal that survives being killed, and the files that EvalPlus reads.

Beside each other in one directory, with one stem that ends in the hash of the run's identity:

    STEM.journal      one checked line per sample, after the identity (journal.py); only ever added to
    STEM.jsonl        {"task_id", "solution"}, sanitized: what EvalPlus's `evaluate` takes
    STEM.raw.jsonl    the same before sanitizing
    STEM.json         the identity, versions, and notes on samples
    STEM.lock         held while somebody writes

The three in the middle are made from the journal, each in one step. A shard's files are STEM.shard-1-of-4.journal and so on.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dylo_moe.atomic import flush_to_disk, make_directory, remove_leftovers, write_atomically, write_together
from dylo_moe.errors import OutputError, SampleFileError
from dylo_moe.identity import identity_hash
from dylo_moe.journal import Content, Plan, Record, plan_line, read_journal, shard_name
from dylo_moe.journal_lines import START_ANEW, checked_line, whole_lines

_LABEL_LENGTH = 80


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
        shard: (i, n), 0 <= i < n, where these are the samples of one shard only.

    Raises:
        SampleFileError: another process is writing; another identity; damage anywhere but at the end.
        OutputError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        identity: dict[str, Any],
        *,
        resume: bool = True,
        shard: tuple[int, int] | None = None,
    ) -> None:
        name = stem + shard_name(shard)
        self.path = directory / f"{name}.journal"
        self.jsonl = directory / f"{name}.jsonl"
        self.raw_jsonl = directory / f"{name}.raw.jsonl"
        self.manifest = directory / f"{name}.json"
        self.resume = resume
        self._content = Content(identity, shard)
        self._lock = FileLock(directory / f"{name}.lock")

    def __enter__(self) -> SampleJournal:
        make_directory(self.path.parent)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SampleFileError(f"{self.path}: another process is writing these samples; wait for it to end") from None
        except NotImplementedError:
            raise SampleFileError(f"{self.path.parent}: a file system without locks; use one that has them") from None
        except OSError as error:
            raise OutputError(self._lock.lock_file, error) from error
        try:
            for path in (self.path, self.jsonl, self.raw_jsonl, self.manifest):
                remove_leftovers(path)
            self._good = self._read() or self._begin()
            self._file = self.path.open("r+b", buffering=0)
            self._file.truncate(self._good)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    @property
    def identity(self) -> dict[str, Any]:
        """Of the run."""
        return self._content.identity

    @property
    def records(self) -> dict[str, dict[int, Record]]:
        """Task id -> index -> sample."""
        return self._content.records

    def missing(self, task_id: str, n_samples: int) -> list[int]:
        """The indices below `n_samples` of which there is no sample of this task, in order."""
        return self._content.missing(task_id, n_samples)

    def append(self, records: Iterable[Record]) -> None:
        """Adds samples, of any tasks and in any order, and returns when they are on the disk.

        Raises:
            SampleFileError: a sample is there already, or is there twice, or the disk takes no more; then none was added.
        """
        records = list(records)
        seen: set[tuple[str, int]] = set()
        for record in records:
            key = (record.task_id, record.index)
            if key in seen or record.index in self.records.get(record.task_id, {}):
                raise SampleFileError(f"{self.path}: sample {record.index} of {record.task_id} for the second time")
            seen.add(key)
        self._write(b"".join(checked_line(asdict(record)) for record in records))
        for record in records:
            self._content.add(record, self.path)

    def excerpt(self, task_ids: Iterable[str]) -> bytes:
        """This journal with the samples of some tasks only, for a worker that continues them elsewhere."""
        records = [record for task in task_ids for record in self.records.get(task, {}).values()]
        return self._content.header() + b"".join(checked_line(asdict(record)) for record in records)

    def absorb(self, lines: bytes) -> list[Record]:
        """Adds what a worker wrote behind an excerpt: whole lines of samples. Returns them.

        Raises:
            SampleFileError: as `append`; or a line is damaged.
        """
        payloads, good = whole_lines(lines, self.path)
        if good != len(lines):
            raise SampleFileError(f"{self.path}: what a worker sent is damaged after {len(payloads)} samples")
        records = [Record(**payload) for payload in payloads]
        self.append(records)
        return records

    def export(
        self, task_order: Iterable[str], n_samples: int, versions: Mapping[str, str], *, chosen: Iterable[str] = ()
    ) -> Path:
        """Writes the files made from the journal: the first `n_samples` of each task, as far as they are there without a gap.

        Args:
            task_order: all tasks of the data set, in the order of its file.
            chosen: the tasks that the run was asked for (all shards together). Those of this journal must be complete.

        Returns:
            The path of STEM.jsonl.

        Raises:
            SampleFileError: a chosen task lacks samples.
            OutputError: a file cannot be written; all are as they were.
        """
        plan = Plan(tuple(task_order), tuple(chosen), n_samples, dict(versions))
        self._require(plan)
        shown = [record for task in plan.order for record in self._first(task, n_samples)]
        about = {"identity": self._content.identity, "n_samples": n_samples, "versions": dict(versions)}
        notes = [{"task_id": r.task_id, "index": r.index, "note": r.note} for r in shown if r.note]
        if self._content.shard is not None and self._content.plan != plan:
            self._write(plan_line(plan))
            self._content.plan = plan
        files = {
            self.raw_jsonl: _jsonl((r.task_id, r.raw) for r in shown),
            self.manifest: json.dumps({**about, "notes": notes}, indent=1, sort_keys=True).encode() + b"\n",
            self.jsonl: _jsonl((r.task_id, r.solution) for r in shown),
        }
        write_together(files)
        return self.jsonl

    def _require(self, plan: Plan) -> None:
        for task in plan.part(self._content.shard):
            if gaps := self.missing(task, plan.n_samples):
                raise SampleFileError(f"{self.path}: sample {gaps[0]} of {task} is missing, so it is not complete yet")

    def _first(self, task_id: str, n_samples: int) -> list[Record]:
        """A task's samples before the first gap: their place in the file is their index."""
        gaps = self.missing(task_id, n_samples)
        return [self.records[task_id][index] for index in range(gaps[0] if gaps else n_samples)]

    def _write(self, data: bytes) -> None:
        """Puts whole lines behind those that are there, or nothing."""
        try:
            self._file.seek(self._good)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            flush_to_disk(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # reading drops it too
                self._file.truncate(self._good)
            raise SampleFileError(
                f"{self.path}: {error.strerror}; every sample before is kept: make room, then run the same command again"
            ) from error
        self._good += len(data)

    def _begin(self) -> int:
        header = self._content.header()
        write_atomically(self.path, header)
        return len(header)

    def _read(self) -> int:
        """Takes in what is there and returns how many bytes of it are whole lines; 0 to begin anew."""
        if not (self.resume and self.path.exists()):
            return 0
        content, good = read_journal(self.path)
        if content is None:
            return 0
        if content.header() != self._content.header():
            raise SampleFileError(f"{self.path}: samples of another run; {START_ANEW}")
        self._content = content
        return good


def _jsonl(pairs: Iterable[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"task_id": task, "solution": text}) + "\n" for task, text in pairs).encode()
