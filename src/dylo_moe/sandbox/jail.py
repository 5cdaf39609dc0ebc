"""A host process at some level: solutions go in, bytes come out."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylo_moe.errors import ScoringError
from dylo_moe.sandbox.bubblewrap import HOME, wrap
from dylo_moe.sandbox.directory import remove
from dylo_moe.sandbox.level import Level
from dylo_moe.sandbox.libraries import import_path

START_SECONDS = 120.0
MEMORY = "EVALPLUS_MAX_MEMORY_BYTES"
MEMORY_BYTES = 4 * 2**30  # EvalPlus's own where nothing is said
GRACE_SECONDS = 60.0  # after its own limits, for the host to say that they are over
_LAST_WORDS_SECONDS = 1.0
_HEAD = 9


class JailBroken(Exception):
    """The host process ended, or does not answer. It has been killed; the next question starts another one."""


class Jail:
    """Runs `python -m dylo_moe.sandbox.host`. Use as a context manager."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._awaited = 0  # answers that have not been read

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._process is not None

    def load(self, task: dict[str, Any]) -> None:
        """Hands over the task that the next solutions are for; `finish_load` waits until it is known.

        task: what outputs.Task reads, with "stock" false, or stock.Task, with "stock" true.

        Raises:
            JailBroken: the host ended.
        """
        if self._process is None:
            self._start()
        self._send("load", task)
        self._awaited += 1

    def finish_load(self, seconds: float) -> None:
        """Raises JailBroken where the host does not get ready within these seconds, besides those of a start."""
        while self._awaited:
            for _ in self._answer(START_SECONDS + seconds):
                raise self._broken("said more than that it is ready")
            self._awaited -= 1

    def check(self, question: dict[str, Any]) -> Iterator[bytes]:
        """What the solution wrote, in chunks.

        question: "solution", "idle_seconds" and "total_seconds" after which it is killed, and what the task's `run` reads.

        Returns (as the generator's value): why it ended: "done", "late", "disk" or "too much".

        Raises:
            JailBroken: nothing is known about this solution.
        """
        self._send("check", question)
        return (yield from self._answer(question["total_seconds"] + GRACE_SECONDS))

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # for what it has not read
                process.stdin.close()
            process.stdout.close()
        if self._directory is not None:
            remove(self._directory)
            self._directory = None

    def _start(self) -> None:
        memory = _memory()  # refuses before there is anything to remove
        self._directory = Path(tempfile.mkdtemp(prefix="dylo-moe-"))
        home = HOME if self.level.bwrap else str(self._directory)
        environment = _environment(home, memory)
        command = [sys.executable, "-m", "dylo_moe.sandbox.host", json.dumps(self.level.as_dict())]
        with self._errors().open("wb") as errors:
            self._process = subprocess.Popen(
                wrap(self.level.bwrap, command, environment) if self.level.bwrap else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._directory,
                env=environment,
                start_new_session=True,
            )
        self._awaited = 1

    def _errors(self) -> Path:
        return self._directory / "stderr"

    def _send(self, method: str, argument: dict[str, Any]) -> None:
        data = pickle.dumps((method, argument))
        try:
            self._process.stdin.write(struct.pack("<Q", len(data)) + data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._broken("ended") from None

    def _answer(self, seconds: float) -> Iterator[bytes]:
        """Chunks, until the host says that it is done. Time in which nobody asks for the next chunk does not count."""
        left = seconds
        while True:
            begin = time.monotonic()
            kind, size = struct.unpack("<cQ", self._take(_HEAD, begin + left))
            data = self._take(size, begin + left)
            left -= time.monotonic() - begin
            if kind == b"E":
                return json.loads(data)
            yield data

    def _take(self, size: int, deadline: float) -> bytes:
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._broken("does not answer")
                more = os.read(self._process.stdout.fileno(), size - len(data))
                if not more:
                    raise self._broken("ended")
                data += more
        return data

    def _broken(self, problem: str) -> JailBroken:
        try:
            self._process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        last = self._errors().read_text(errors="replace").strip().rpartition("\n")[2]
        self.stop()
        return JailBroken(f"the process that runs generated code {problem}{': ' + last[:300] if last else ''}")


def _environment(home: str, memory: int) -> dict[str, str]:
    """Nothing of ours reaches generated code but what the interpreter needs: the rest may hold keys and tokens."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ} | {MEMORY: str(memory)}
    private = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), home)
    fixed = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return {**kept, **private, **fixed, "PYTHONPATH": import_path()}


def _memory() -> int:
    """Bytes that generated code may use: as EvalPlus takes them, but no more than this process may, or its guard fails.

    Raises:
        ScoringError: not a number.
    """
    text = os.environ.get(MEMORY, str(MEMORY_BYTES))
    if not text.strip().removeprefix("-").isdigit():
        raise ScoringError(f"{MEMORY} is {text!r}, but should be a number of bytes")
    hard = [resource.getrlimit(limit)[1] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([int(text), *(limit for limit in hard if limit != resource.RLIM_INFINITY)])
