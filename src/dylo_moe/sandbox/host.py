"""The jailed process: forks a process per solution, locks it down, watches it, and passes on what it writes.

It reads pickles from whom it serves, and what it writes is bytes. It runs nothing but canonical solutions itself.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dylo_moe.sandbox import outputs, stock
from dylo_moe.sandbox.directory import overfull, remove
from dylo_moe.sandbox.level import Level
from dylo_moe.sandbox.libraries import readable
from dylo_moe.sandbox.lockdown import die_with_parent, leave_network, lock_down

DATA, END = b"D", b"E"
MAX_BYTES = 4 * 2**30  # of one solution's records
_TICK = 0.1
_CHUNK = 1 << 20


class Host:
    """Answers questions one by one."""

    def __init__(self, level: Level, answers: BinaryIO) -> None:
        self.level = level
        self.readable = readable()
        self._answers = answers
        self._task: outputs.Task | stock.Task | None = None

    def load(self, task: dict[str, Any]) -> None:
        self._task = None
        self._task = stock.Task(task) if task["stock"] else outputs.Task(task)
        gc.collect()
        gc.freeze()  # so that a forked process's collector leaves our pages alone
        self.end("loaded")

    def check(self, question: dict[str, Any]) -> None:
        """Runs one solution in a process of its own, in an empty directory of its own."""
        directory = tempfile.mkdtemp(prefix="check-", dir=os.getcwd())
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._run(question, write, directory)
        os.close(write)
        guard = _Guard(pid, Path(directory))
        try:
            reason = self._watch(read, question["idle_seconds"], question["total_seconds"])
        finally:
            _kill(pid)
            guard.stop()
            os.waitpid(pid, 0)
            os.close(read)
            remove(Path(directory))
        self.end("disk" if guard.overfull else reason)

    def end(self, reason: str) -> None:
        self._say(END, json.dumps(reason).encode())

    def _run(self, question: dict[str, Any], pipe: int, directory: str) -> None:
        """The forked process: never returns."""
        try:
            os.setsid()
            _close_all_but(pipe)
            os.chdir(directory)
            lock = partial(_lock, self.level, self.readable, directory)
            if isinstance(self._task, stock.Task):
                self._task.run(question, pipe, lock)
            else:
                lock()
                self._task.run(question, pipe)
        finally:
            os._exit(0)

    def _watch(self, pipe: int, idle_seconds: float, total_seconds: float) -> str:
        """Passes on what comes out of the pipe until it ends; returns why it ended. The time to pass it on does not count."""
        begin = last = time.monotonic()
        size = 0
        while True:
            now = time.monotonic()
            if now - last > idle_seconds or now - begin > total_seconds:
                return "late"
            if size > MAX_BYTES:
                return "too much"
            if not select.select([pipe], [], [], _TICK)[0]:
                continue
            data = os.read(pipe, _CHUNK)
            if not data:
                return "done"
            came = time.monotonic()
            self._say(DATA, data)
            size += len(data)
            last = time.monotonic()
            begin += last - came

    def _say(self, kind: bytes, data: bytes) -> None:
        self._answers.write(kind + struct.pack("<Q", len(data)))
        self._answers.write(data)
        self._answers.flush()


class _Guard:
    """Kills a process that writes too much to its directory, also while nobody has time for what it says.

    Attributes:
        overfull: whether it did.
    """

    def __init__(self, pid: int, directory: Path) -> None:
        self.overfull = False
        self._pid, self._directory = pid, directory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        """The process may be waited for only then: until it is, its number is no other's."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_TICK):
            if overfull(self._directory):
                self.overfull = True
                _kill(self._pid)
                return


def _lock(level: Level, paths: list[str], directory: str) -> None:
    if level.seccomp:
        die_with_parent()
    lock_down(level, paths, directory)


def _close_all_but(pipe: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))


def _kill(pid: int) -> None:
    """The process and what it forked; that it has not yet become a group's leader is possible."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _read(questions: BinaryIO) -> Any:
    head = questions.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(questions.read(struct.unpack("<Q", head)[0]))


def serve(level: Level, questions: BinaryIO, answers: BinaryIO) -> None:
    """Reads (method, argument) pairs until the pipe is closed."""
    host = Host(level, answers)
    methods: dict[str, Callable[[dict[str, Any]], None]] = {"load": host.load, "check": host.check}
    host.end("ready")
    while (question := _read(questions)) is not None:
        name, argument = question
        methods[name](argument)


def main() -> None:
    level = Level(**json.loads(sys.argv[1]))
    multiprocessing.set_start_method("fork")  # EvalPlus hands Values and Arrays over
    leave_network(level)
    die_with_parent()
    with os.fdopen(os.dup(0), "rb") as questions, os.fdopen(os.dup(1), "wb") as answers:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        serve(level, questions, answers)


if __name__ == "__main__":
    main()
