"""One child process reads the pickles of many checkpoints, and whatever becomes of it the next file is read."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dylo_moe.errors import UnreadableFile
from dylo_moe.formats.pickle_file import convert_pickles, run_child
from dylo_moe.formats.pickle_reader import READER


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def read(path: Path) -> list[float]:
    return convert_pickles({path: path})[path][0]["a"].tolist()


def test_second_checkpoint_is_read_by_the_same_child(saved):
    assert read(saved) == [1, 1]
    first = READER.pid
    assert first is not None
    assert read(saved) == [1, 1]
    assert READER.pid == first


def test_child_that_is_gone_is_started_again(saved):
    read(saved)
    os.kill(READER.pid, signal.SIGKILL)
    assert read(saved) == [1, 1]


def test_reading_that_takes_too_long_is_ended_and_the_next_one_is_not(saved, tmp_path):
    read(saved)
    slow = READER.pid
    with pytest.raises(UnreadableFile, match="more than 0 s"):
        run_child([saved], tmp_path, 0.0)
    with pytest.raises(ProcessLookupError):
        os.kill(slow, 0)
    assert read(saved) == [1, 1]


def test_a_fork_of_ours_reads_with_a_child_of_its_own(saved, tmp_path):
    read(saved)
    pid = os.fork()
    if pid == 0:
        try:
            (tmp_path / "seen").write_text(json.dumps([READER.pid, read(saved), READER.pid]))
            READER.stop()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    before, values, own = json.loads((tmp_path / "seen").read_text())
    assert before is None and values == [1, 1] and own != READER.pid
    assert read(saved) == [1, 1]


def test_path_is_that_of_the_caller_not_of_the_child(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(Path("a.pt")) == [1, 1]
