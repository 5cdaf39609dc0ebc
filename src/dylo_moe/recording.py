"""Samples go to their journals as they are written: sanitized in a child process, and beside the generation, in one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dylo_moe.journal import Record
from dylo_moe.samples import SampleJournal
from dylo_moe.sanitizing import Sanitizer


class Recorder:
    """Sanitizes and records in the order of `add`. Leaving it, also because of an error, records what was added before.

    Use as a context manager. The journals belong to it meanwhile.

    Args:
        say: shows the user a line, such as why a solution is not sanitized.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._sanitizer = Sanitizer()
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Recorder:
        self._pending.append(self._thread.submit(self._sanitizer.start))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        self._sanitizer.__exit__()
        if kind is None:
            self._raise_failures()

    def add(self, journal: SampleJournal, raw: Record, entry_point: str) -> None:
        """Returns at once. raw: the sample; its solution is what is to be sanitized.

        Raises:
            SampleFileError, ScoringError: an earlier sample could not be recorded.
        """
        self._raise_failures()
        self._pending.append(self._thread.submit(self._record, journal, raw, entry_point))

    def _record(self, journal: SampleJournal, raw: Record, entry_point: str) -> None:
        solution, note = self._sanitizer(raw.solution, entry_point)
        journal.append([Record(raw.task_id, raw.index, solution, raw.raw, note)])
        if note:
            self._say(f"{raw.task_id} sample {raw.index}: {note}")

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
