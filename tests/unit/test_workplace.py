"""Directories of dead processes go, those of living ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dylo_moe import workplace
from dylo_moe.workplace import Workplace

KILLED = """
import os, signal
from dylo_moe.workplace import Workplace
place = Workplace()
(place.path / "a.journal").write_text("x")
print(place.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def aged(path: Path) -> Path:
    os.utime(path, (time.time() - 2 * workplace._SECONDS_TO_LOCK,) * 2)
    return path


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(temporary):
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    left = Path(done.stdout.strip())
    assert left.parent == temporary and (left / "a.journal").exists() and done.returncode < 0
    living = Workplace()
    assert left.exists(), "young: it may belong to a process that is about to lock it"
    aged(left), aged(living.path)
    other = aged(Path(tempfile.mkdtemp(prefix="somebody-else-")))
    target = aged(Path(tempfile.mkdtemp(prefix="target-")))
    (temporary / f"{workplace._PREFIX}link").symlink_to(target)
    new = Workplace()
    assert not left.exists() and {living.path, new.path, other, target} < set(temporary.iterdir())


DEEP = """
import os, signal
from dylo_moe.worker import Worker
worker = Worker("dylo_moe.sanitize_worker")
worker._start()
os.chdir(worker._place.path)
for _ in range(1500):
    os.mkdir("d")
    os.chdir("d")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_directory_of_a_child_whose_parent_was_killed_goes_however_deep_it_is(temporary):
    assert subprocess.run([sys.executable, "-c", DEEP], timeout=60).returncode == -9
    (left,) = temporary.iterdir()
    aged(left)
    Workplace()
    assert not left.exists()


def test_removed_place_is_gone_with_all_that_is_in_it():
    place = Workplace()
    (place.path / "file").write_text("x")
    place.remove()
    assert not place.path.exists()
