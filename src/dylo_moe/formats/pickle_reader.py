"""The child process that reads pickles: started with the first one, kept for the next ones, gone when it is asked nothing."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from pathlib import Path

_CHILD = Path(__file__).with_name("pickle_child.py")


class PickleReader:
    """One pickle_child.py at a time, whose every request is answered by a process of its own. Threads take turns."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._process is None else self._process.pid

    def read(self, files: list[Path], scratch: Path, seconds: float) -> None:
        """Has the files read into `scratch`; see pickle_child.py. Raises TimeoutError after `seconds`, and ends the child."""
        request = json.dumps([str(scratch.absolute()), *(str(file.absolute()) for file in files)]).encode() + b"\n"
        with self._turn:
            if not self._ask(request, seconds):  # it was about to leave, or did not survive
                self._ask(request, seconds)

    def stop(self) -> None:
        """Ends the child, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def _ask(self, request: bytes, seconds: float) -> bool:
        """Whether there was an answer."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(request)
            answered = bool(self._answer(seconds))
        except BrokenPipeError:
            answered = False
        except TimeoutError:
            self.stop()
            raise
        if not answered:
            self.stop()
        return answered

    def _answer(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise TimeoutError
        return self._process.stdout.read(1)

    def _start(self) -> None:
        # TORCH_* variables can switch weights_only off; the child gets none of them.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH")}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            env=environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # killed with what it started
        )


READER = PickleReader()
atexit.register(READER.stop)
os.register_at_fork(after_in_child=READER.__init__)  # the child is the parent's; a fork starts its own
