"""The journal when the process is killed between two calls to the system, when the disk is full, and when two write at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.errors import SampleFileError
from dylo_moe.journal import Record
from dylo_moe.samples import SampleJournal, sample_stem

IDENTITY = {"checkpoint": "abc"}
STEM = sample_stem("m", ["router"], IDENTITY)
TASKS = ("T/0", "T/1", "T/2")
# What changes a file system, as Python calls it.
WRITES = frozenset({"open", "write", "flush", "close", "fsync", "truncate", "replace", "unlink", "mkdir", "flock"})


def generate(directory: Path, shard: tuple[int, int] | None = None) -> Path:
    """What a command does: it adds what is missing, task by task, and exports."""
    with SampleJournal(directory, STEM, IDENTITY, shard=shard) as journal:
        for task in TASKS if shard is None else TASKS[shard[0] :: shard[1]]:
            missing = journal.missing(task, 2)
            journal.append(Record(task, i, f"{task} {i} " + "x" * 300, "raw") for i in missing)
        return journal.export(TASKS, 2, {"dylo-moe": "0"}, chosen=TASKS)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


def killed_before_call(number: int, directory: Path) -> bool:
    """Runs `generate` in a fork that is killed before the numbered call; False if it had fewer calls."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(_frame: object, event: str, function: object) -> None:
            nonlocal seen
            if event == "c_call" and function.__name__ in WRITES:
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        code = 1
        try:
            sys.setprofile(count)
            generate(directory)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_between_any_two_calls_that_write_the_next_run_ends_as_an_undisturbed_one(tmp_path):
    generate(tmp_path / "undisturbed")
    expected = files(tmp_path / "undisturbed")
    number = 0
    while killed_before_call(number, directory := tmp_path / str(number)):
        if directory.is_dir():
            whole = [name for name in files(directory) if name in expected and not name.endswith(".journal")]
            assert all(files(directory)[name] == expected[name] for name in whole)
        generate(directory)
        assert files(directory) == expected, number
        number += 1
    assert number > 40
    assert files(tmp_path / str(number)) == expected


def test_no_room_at_any_byte_is_one_line_and_the_same_run_continues_when_there_is(tmp_path, file_size_limit):
    generate(tmp_path / "undisturbed")
    expected = files(tmp_path / "undisturbed")
    largest = max(map(len, expected.values()))
    messages = set()
    for size in range(0, largest, 97):
        directory = tmp_path / str(size)
        with file_size_limit(size), pytest.raises((SampleFileError, OSError)) as caught:
            generate(directory)
        messages.add(str(caught.value).split(": ", 1)[-1])
        assert not list(directory.glob(".*.tmp"))
        with contextlib.suppress(SampleFileError, OSError), file_size_limit(size):
            generate(directory)  # again without room: nothing gets worse
        generate(directory)
        assert files(directory) == expected, size
    assert any("every sample before is kept: make room" in message for message in messages)
    assert all("\n" not in message for message in messages)


def test_samples_that_were_written_before_the_disk_was_full_are_not_made_again(tmp_path, file_size_limit):
    with SampleJournal(tmp_path, STEM, IDENTITY) as journal:
        journal.append([Record("T/0", 0, "a", "b")])
        with file_size_limit(journal.path.stat().st_size + 20), pytest.raises(SampleFileError, match="File too large"):
            journal.append([Record("T/1", 0, "a", "b")])
        assert journal.missing("T/1", 1) == [0]
        journal.append([Record("T/2", 0, "a", "b")])  # and the open journal can be used again
    with SampleJournal(tmp_path, STEM, IDENTITY) as journal:
        assert list(journal.records) == ["T/0", "T/2"]


def in_small_file_system(program: str, size: str, argument: str) -> str:
    """Runs a Python program with a file system of `size` mounted at its second argument, in a namespace of its own."""
    mount = 'mount -t tmpfs -o size="$0" none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, size, argument, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 32 or "unshare" in done.stderr:  # 32: mount failed
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import json, sys
from pathlib import Path
sys.path.insert(0, TESTS)
from test_journal_faults import files, generate
place = Path(sys.argv[1])
generate(place / "run")
expected = files(place / "run")
for path in (place / "run").iterdir():
    path.unlink()
filler = place / "filler"
said = []
for left in range(0, 7):
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == 28
        file.truncate(file.tell() - 4096 * left)
    try:
        generate(place / "run")
    except (OSError, ValueError) as error:
        said.append(str(error))
    filler.unlink()
generate(place / "run")
print(json.dumps([said, files(place / "run") == expected]))
"""


def test_full_disk_is_one_line_and_the_same_run_continues_when_there_is_room(tmp_path):
    program = FULL.replace("TESTS", repr(str(Path(__file__).parent)))
    said, same = json.loads(in_small_file_system(program, "256k", str(tmp_path)))
    assert same
    assert len(said) > 1 and all("No space left on device" in line and "\n" not in line for line in said)


def test_of_two_that_start_at_once_one_writes_and_the_other_is_told(tmp_path):
    reader, writer = os.pipe()
    pids = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            code = 3
            try:
                os.close(writer)
                os.read(reader, 1)  # until the parent lets both go
                with SampleJournal(tmp_path, STEM, IDENTITY) as journal:
                    for index in range(50):
                        journal.append([Record("T/0", index, "a", "b")])
                code = 0
            except SampleFileError as error:
                code = 2 if "another process is writing" in str(error) else 3
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(reader)
    os.close(writer)
    codes = sorted(os.WEXITSTATUS(os.waitpid(pid, 0)[1]) for pid in pids)
    with SampleJournal(tmp_path, STEM, IDENTITY) as journal:
        assert journal.missing("T/0", 50) == []
    assert codes == [0, 2]
