"""Runs a solution on every input and tells what it returned. It is never told what it should have returned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from evalplus.eval import query_maximum_memory_bytes
from evalplus.eval.utils import TimeoutException, WriteOnlyStringIO, redirect_stdin, reliability_guard, time_limit

from dylo_moe.sandbox.encoding import NotEncoded, encode
from dylo_moe.sandbox.records import ERROR, LOADED, NOT_LOADED, TIMEOUT, TOO_LARGE, VALUE, record

MAX_VALUE_BYTES = 2**30


class Task:
    """What the running process knows of a task: the inputs, and how the outputs are wanted."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.entry_point: str = task["entry_point"]
        self.inputs: dict[str, list[list]] = task["inputs"]
        self.shape: Callable[[Any], Any] = set if task["as_set"] else _as_it_is

    def run(self, question: dict[str, Any], pipe: int) -> None:
        """Writes a record for the start and one per input to `pipe`. The process is locked down already."""
        reliability_guard(query_maximum_memory_bytes())
        function, kind = self._load(question["solution"], question["load_seconds"])
        _write(pipe, record(kind))
        if kind != LOADED:
            return
        for arguments, seconds in zip(self.inputs[question["part"]], question["seconds"], strict=True):
            kind, payload = self._call(function, arguments, seconds, question["encode_seconds"])
            _write(pipe, record(kind, payload))
            if kind != VALUE and question["stop_early"]:
                return

    def _load(self, solution: str, seconds: float) -> tuple[Any, bytes]:
        names: dict[str, Any] = {}
        try:
            with time_limit(seconds), _silence():
                exec(solution, names)
                return names[self.entry_point], LOADED
        except TimeoutException:
            return None, TIMEOUT
        except BaseException:  # noqa: BLE001  (whatever a solution raises, SystemExit included, is its answer)
            return None, NOT_LOADED

    def _call(self, function: Callable, arguments: list, seconds: float, encode_seconds: float) -> tuple[bytes, bytes]:
        try:
            with time_limit(seconds), _silence():
                value = function(*arguments)
            with time_limit(encode_seconds):
                return VALUE, encode(self.shape(value), MAX_VALUE_BYTES)
        except TimeoutException:
            return TIMEOUT, b""
        except NotEncoded:
            return TOO_LARGE, b""
        except BaseException:  # noqa: BLE001  (see above)
            return ERROR, b""


def _as_it_is(value: Any) -> Any:
    return value


class _Nowhere(WriteOnlyStringIO):
    """Forgets what is printed, of which there may be no end."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """EvalPlus's `swallow_io` without the memory that it takes."""
    stream = _Nowhere()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), redirect_stdin(stream):
        yield


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]
