"""A child process that answers one question at a time, and that is killed when an answer takes too long.

A fresh interpreter, not a fork: the parent may hold a model, whose memory and threads the child must not inherit. Used for
whatever may hang, eat memory or crash: EvalPlus's sanitizer, and generated code.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from dylo_moe.workplace import Workplace

START_SECONDS = 120.0
# Nothing else of the environment reaches the child: it may hold keys and tokens.
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "EVALPLUS_MAX_MEMORY_BYTES")


class WorkerGone(Exception):
    """The child did not answer in time (late=True), or died. It has been killed; the next question starts another one."""

    def __init__(self, message: str, *, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Worker:
    """Runs `python -m <module>` in a private empty directory (see workplace.py) and talks JSON lines with it over pipes.

    Use as a context manager. Questions and answers are JSON objects.

    Args:
        environment: variables that the child gets besides the few that every child gets.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self.module = module
        self._extra = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._place: Workplace | None = None
        self._pending = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the child where there is none, and waits until it can be asked. Raises WorkerGone."""
        if self._process is None:
            self._start()

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The child's answer.

        Raises:
            WorkerGone: no answer within `seconds` (after a start, which has its own limit), or the child died.
        """
        self.start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read(seconds)

    def stop(self) -> None:
        """Kills the child and everything it started in its session, and removes its directory."""
        process, self._process, self._pending = self._process, None, b""
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if self._place is not None:
            self._place.remove()
            self._place = None

    def _start(self) -> None:
        self._place = Workplace()
        with self._errors().open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._place.path,
                env=self._extra | _environment(str(self._place.path)),
                start_new_session=True,
            )
        self._read(START_SECONDS)

    def _errors(self) -> Path:
        return self._place.path / "stderr"

    def _read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    raise WorkerGone(f"{self.module} did not answer within {seconds:g} s", late=True)
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._died()
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _died(self) -> WorkerGone:
        last = self._errors().read_text(errors="replace").strip().rpartition("\n")[2]
        self.stop()
        return WorkerGone(f"{self.module} died{': ' + last[:300] if last else ''}", late=False)


def _environment(directory: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    if "PYTHONPATH" in kept:  # the child starts in another directory
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, kept["PYTHONPATH"].split(os.pathsep)))
    private = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), directory)
    return {**kept, **private, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: says that it is ready, then answers line by line until the parent closes the pipe.

    The pipes are moved away from file descriptors 0 and 1, and closed in whatever is forked from here, so that code that
    prints cannot be taken for an answer.
    """
    questions, answers = _private(0, "r"), _private(1, "w")
    os.register_at_fork(after_in_child=lambda: (os.close(questions.fileno()), os.close(answers.fileno())))
    _say(answers, {"ready": True})
    for line in questions:
        _say(answers, answer(json.loads(line)))


def _private(descriptor: int, mode: str) -> TextIO:
    stream = os.fdopen(os.dup(descriptor), mode, encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return stream


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def limit_memory(limit_bytes: int) -> None:
    """Caps this process's address space, where it is not capped lower already. Called by a child before it does anything."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit_bytes = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
