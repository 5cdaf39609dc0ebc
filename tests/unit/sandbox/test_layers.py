"""The layers of the sandbox one by one: what each is made of, and what happens where one is missing."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.errors import OptionError, ScoringError
from dylo_moe.sandbox import ladder, landlock
from dylo_moe.sandbox.canaries import problems
from dylo_moe.sandbox.level import NONE, Level
from dylo_moe.sandbox.records import ERROR, LOADED, TOO_LARGE, VALUE, read_records, record
from dylo_moe.sandbox.seccomp import checks, program
from dylo_moe.sandbox.syscalls import ALLOWED, CHECKED, MACHINES, ONLY_X86_64, REFUSED, number
from dylo_moe.scoring import Limits, Scorer
from dylo_moe.tasks import load_tasks
from harness.specimens.tasks import TASKS, write_task_set

ERRNO, ALLOW, KILL = 0x00050000, 0x7FFF0000, 0x80000000
NEVER = {
    *("execve", "execveat", "fork", "vfork", "socket", "connect", "bind", "ptrace", "process_vm_writev", "io_uring_setup"),
    *("sendmsg", "memfd_create", "chmod", "mount", "bpf", "setsid", "pidfd_open", "unshare", "keyctl", "shmget", "prctl"),
}
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_kernels_headers(machine):
    header = Path(HEADERS[machine])
    if not header.is_file():
        pytest.skip(f"no {header}: install linux-libc-dev")
    text = header.read_text()
    known = {name: int(value) for name, value in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    aliases = dict(re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", text))
    names = [*ALLOWED, *CHECKED, *REFUSED, *(ONLY_X86_64 if machine == "x86_64" else ())]
    found = {name: known.get(name, known.get(aliases.get(name))) for name in names}
    assert found == {name: number(name, machine) for name in names}


def answer(filter_bytes: bytes, machine: int, call: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """Runs a filter by hand, as the kernel does (linux/filter.h)."""
    import struct

    data = struct.pack("<IIQ6Q", call, machine, 0, *arguments)
    code = [struct.unpack_from("=HBBI", filter_bytes, at) for at in range(0, len(filter_bytes), 8)]
    accumulator = at = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            at += yes if (accumulator == value if operation == 0x15 else accumulator & value) else no


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_allows_what_is_listed_and_nothing_else(machine):
    code, audit = program(machine, 77), MACHINES[machine]
    allowed = {number(name, machine) for name in (*ALLOWED, *(ONLY_X86_64 if machine == "x86_64" else ()))}
    checked = {number(name, machine) for name in (*CHECKED, *REFUSED)}
    for call in range(700):
        if call not in checked:
            assert (answer(code, audit, call) == ALLOW) is (call in allowed), call
    assert NEVER.isdisjoint({*ALLOWED, *ONLY_X86_64, *CHECKED})
    assert answer(code, audit, 0x40000000 | number("write", machine)) == ERRNO | 1  # x32
    assert {answer(code, other, number("write", machine)) for other in (0, 0x40000003, *({*MACHINES.values()} - {audit}))} == {
        KILL
    }
    assert answer(code, audit, number("clone3", machine)) == ERRNO | 38


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "good", "bad"),
    [
        ("kill", (77, 9), [(76, 9), (0, 9), (2**64 - 1, 9), (2**32 + 77, 9)]),
        ("tgkill", (77, 77, 6), [(1, 77, 6)]),
        ("clone", (0x10000 | 0x100,), [(0,), (0x10000000,)]),
        ("fcntl", (3, 4), [(3, 8), (3, 10), (3, 2**32)]),
        ("sendto", (3, 1, 1, 0, 0, 0), [(3, 1, 1, 0, 1, 0), (3, 1, 1, 0, 2**32, 0)]),
        ("socketpair", (1,), [(2,), (10,)]),
        ("prlimit64", (0,), [(1,)]),
    ],
)
def test_arguments_decide_about_some_calls(machine, call, good, bad):
    code, audit = program(machine, 77), MACHINES[machine]
    assert call in {check.name for check in checks(77)}

    def found(arguments):
        return answer(code, audit, number(call, machine), (*arguments, *[0] * (6 - len(arguments))))

    assert found(good) == ALLOW
    assert {found(arguments) for arguments in bad} == {ERRNO | 1}


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (NONE, ["connect", "read", "write", "fork", "signal"]),
        (Level(seccomp=True), ["read", "write"]),
    ],
    ids=["nothing", "seccomp alone"],
)
def test_level_without_a_layer_is_found_out(level, words):
    if platform.machine() not in MACHINES or platform.system() != "Linux":
        pytest.skip(f"no list of system calls for {platform.system()} on {platform.machine()}")
    assert [f"a solution can {word}" for word in words] == [found for found in problems(level) if found.startswith("a solution")]
    assert "write a file outside its directory" in problems(level)


def test_level_that_does_not_start_is_found_out(tmp_path):
    broken = write_program(tmp_path / "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    (found,) = problems(Level(str(broken), 0, seccomp=True))
    assert "No permissions to create new namespace" in found


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_bwrap_that_does_not_work_is_refused_or_passed_over(monkeypatch, tmp_path):
    write_program(tmp_path / "bwrap", "echo broken here >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ScoringError, match="broken here.*--sandbox none") as refused:
        ladder.choose("bwrap")
    assert "\n" not in str(refused.value)
    if landlock.version() < ladder.LANDLOCK_ENOUGH:
        pytest.skip(f"Landlock {landlock.version()} here, so that nothing is left without bwrap")
    assert ladder.choose("auto").name == "landlock+seccomp"


def test_without_bwrap_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScoringError, match=r"no bubblewrap \(bwrap\) here; --sandbox none"):
        ladder.choose("bwrap")


def test_where_nothing_holds_it_is_refused_and_never_run_weaker(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ladder, "version", lambda: 2)  # an older kernel
    with pytest.raises(ScoringError, match="neither bubblewrap nor Landlock here; --sandbox none"):
        ladder.choose("auto")
    assert ladder.choose("none") == NONE
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(ScoringError, match="no sandbox for Darwin"):
        ladder.choose("auto")


def test_unknown_sandbox_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:1])))
    with pytest.raises(OptionError, match="'docker'.*auto, bwrap, none"):
        Scorer(load_tasks("humaneval"), Limits(), sandbox="docker")


def test_records_are_read_until_the_first_that_is_none():
    good = [(LOADED, b""), (VALUE, b"x" * 10), (ERROR, b"")]
    data = b"".join(record(kind, payload) for kind, payload in good)
    assert list(read_records([data[i : i + 1] for i in range(len(data))], 10)) == good
    assert list(read_records([data], 9)) == [good[0], (TOO_LARGE, b"")]
    assert list(read_records([data + b"?" * 20 + data], 10)) == good
    assert list(read_records([data[:-1]], 10)) == good[:2]
    assert list(read_records([record(VALUE, b"")[:1] + b"\xff" * 8], 10)) == [(TOO_LARGE, b"")]


def test_landlock_alone_leaves_only_what_it_is_given(tmp_path):
    if not landlock.version():
        pytest.skip("the kernel has no Landlock")
    for name in ("readable", "writable", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    code = f"""
import io, os
from dylo_moe.sandbox import landlock
landlock.restrict([{str(tmp_path / "readable")!r}, "/does/not/exist"], [{str(tmp_path / "writable")!r}])
for name in ("readable", "writable", "other"):
    for mode in "ra":
        try:
            io.open(os.path.join({str(tmp_path)!r}, name, "file"), mode).close()
            print(name, mode)
        except PermissionError:
            pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["readable r", "writable r", "writable a"]
