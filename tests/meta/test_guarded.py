"""No code under judgement decides the exit code by ending the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PRELUDE = "import atexit, os, signal, sys, time\nfrom harness.guarded import guarded\n"


def script(work: str) -> list[str]:
    source = f"{PRELUDE}def work():\n    {work}\nsys.exit(guarded(work, 'judge'))\n"
    return [sys.executable, "-c", source]


@pytest.mark.parametrize(
    ("work", "code", "told"),
    [
        ("return 0", 0, ""),
        ("return 4", 4, ""),
        ("os._exit(0)", 3, "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, "SIGKILL"),
        ("atexit.register(os._exit, 0); return 1", 1, ""),
        ("os.fork() or time.sleep(5); os._exit(0)", 3, "exit code 0"),
    ],
)
def test_exit_code_is_the_one_that_was_said_and_never_0_without_one(work: str, code: int, told: str) -> None:
    with subprocess.Popen(script(work), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        assert process.wait() == code
    assert told in line and bool(line) == bool(told)
    assert "Traceback" not in line


WAITING = "try:\n        print(os.getpid(), flush=True); time.sleep(60)\n    except KeyboardInterrupt:\n        return 130"


def test_interrupt_reaches_the_work_once_however_often_it_is_sent() -> None:
    with subprocess.Popen(script(WAITING), stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        os.kill(child, signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_work_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen(script(WAITING), stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 20
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_command_is_guarded() -> None:
    source = "import os, sys, harness.cli as cli\ncli._answered = lambda command: os._exit(0)\nsys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("validate_moe_modifications: ended with exit code 0, no verdict")
