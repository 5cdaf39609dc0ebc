"""The command in a process of its own, so that no code under judgement decides the exit code by ending the process.

`os._exit(0)`, an exit handler, a crash in a library: without the judge's own word there is no verdict. (A subject that means to
deceive can still change the judge, which runs in the same interpreter: docs/subjects.md.)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")
# Ctrl-C in a terminal reaches both processes, and the child again by way of the parent.
SAME_INTERRUPT = 1.0  # seconds
EXIT_WITHOUT_WORD = 3  # outcome.EXIT_JUDGE_FAILED


def guarded(work: Callable[[], int], program: str) -> int:
    """work() in a child; its exit code, or 3 and a line on stderr where the child ended without having said one.

    work: imports what it needs itself; nothing that starts threads may be imported before. Without fork it runs here.
    """
    if not hasattr(os, "fork"):
        return work()
    word, alive = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive[1])
        threading.Thread(target=_end_with_parent, args=(alive[0],), daemon=True).start()
        signal.signal(signal.SIGINT, _interrupted_once())
        code = work()
        os.write(word[1], bytes([code]))  # from here on nothing that the process does counts
        return code
    os.close(word[1])
    for name in FORWARDED:
        signal.signal(getattr(signal, name), lambda number, frame: _forward(child, number))
    _, status = os.waitpid(child, 0)
    os.set_blocking(word[0], False)  # a process that the child has left behind may hold the other end
    return _said(word[0], status, program)


def _said(word: int, status: int, program: str) -> int:
    try:
        said = os.read(word, 1)
    except BlockingIOError:
        said = b""
    if said:
        return said[0]
    code = os.waitstatus_to_exitcode(status)
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    print(f"{program}: ended with {how}, no verdict: it was killed, or code under judgement ended it", file=sys.stderr)
    return EXIT_WITHOUT_WORD


def _forward(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass  # it has just ended by itself


def _end_with_parent(alive: int) -> None:
    """The read returns when the last process that holds the other end has ended: the parent, killed."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupted_once() -> Callable[[int, FrameType | None], None]:
    last = -SAME_INTERRUPT

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > SAME_INTERRUPT:
            last = now
            raise KeyboardInterrupt

    return interrupted
