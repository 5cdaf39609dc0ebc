"""Solutions that attack: at every level of the sandbox that this machine has, nothing comes of it and the next solution runs."""

from __future__ import annotations

import importlib.util
import socket
import time
from pathlib import Path

import pytest

from dylo_moe.sandbox.decoding import decode
from dylo_moe.sandbox.jail import Jail
from dylo_moe.sandbox.ladder import candidates
from dylo_moe.sandbox.level import NONE
from dylo_moe.sandbox.records import LOADED, VALUE, read_records

SPEC = importlib.util.spec_from_file_location("attacks", Path(__file__).with_name("attacks.py"))
attacks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(attacks)
HARMS = {
    f"{kind}-{name}": code
    for kind in ("read", "write", "net", "process")
    for name, code in getattr(attacks, kind.upper()).items()
}
# What works for an ordinary process, whoever runs it; others need root, or end or disturb the test itself.
WORKS_WITHOUT = (
    *(f"read-{name}" for name in ("io_open", "pathlib", "reloaded_os", "libc_open", "symlink", "own_memory", "listing")),
    *(f"write-{name}" for name in ("new_file", "overwritten", "cut", "moved", "through_a_link")),
    *(f"net-{name}" for name in ("tcp", "udp", "unix", "unix_datagram", "listen")),
    *(f"process-{name}" for name in ("fork", "spawn", "kill_parent", "signal_by_descriptor", "memory_file")),
)
SECONDS = 0.5


@pytest.fixture(scope="module", params=["bwrap", "landlock"])
def jail(request):
    levels = [level for level in candidates() if bool(level.bwrap) == (request.param == "bwrap")]
    if not levels:
        pytest.skip(f"this machine has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVALPLUS_MAX_MEMORY_BYTES", str(2**30))  # so that filling it is soon over
        with Jail(levels[0]) as jail:
            yield jail


@pytest.fixture(scope="module")
def free():
    with Jail(NONE) as jail:
        yield jail


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Things to attack: files outside, and servers that no solution may reach."""
    (tmp_path / "secret").write_text("secret")
    monkeypatch.chdir(tmp_path)  # addresses of unix sockets must be short
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "u"))
        unix.listen()
        datagram.bind(str(tmp_path / "d"))
        yield {
            "directory": str(tmp_path),
            "secret": str(tmp_path / "secret"),
            "new": str(tmp_path / "new"),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "unix": str(tmp_path / "u"),
            "datagram": str(tmp_path / "d"),
        }


def run(jail, code, target):
    """What comes of a solution: the value that it returns, or the kind of record that comes instead, or b"" for none."""
    if not jail.running:
        jail.load({"stock": False, "entry_point": "f", "inputs": {"base": [[{}]]}, "as_set": False})
        jail.finish_load(60)
    code = f"{attacks.START}    target = {target!r}\n{code}\n"
    times = {"load_seconds": 10, "seconds": [SECONDS], "encode_seconds": 5, "idle_seconds": 4, "total_seconds": 12}
    chunks = jail.check({"part": "base", "solution": code, "stop_early": True, **times})
    (kind, _), *rest = [*read_records(list(chunks), 2**20), (b"", b"")]
    assert kind in (LOADED, b""), kind
    kind, data = rest[0] if rest else (b"", b"")
    return decode(data) if kind == VALUE else kind


def works(jail, target):
    return run(jail, "    return [target['tcp'], len(posix.listdir('.'))]", target) == [target["tcp"], 0]


@pytest.mark.parametrize("attack", HARMS)
def test_attack_is_refused_and_the_next_solution_runs(jail, target, attack):
    assert works(jail, target)
    before = sorted(Path(target["directory"]).iterdir())
    assert run(jail, HARMS[attack], target) != "harm"
    assert sorted(Path(target["directory"]).iterdir()) == before
    assert Path(target["secret"]).read_text() == "secret"
    assert works(jail, target)


@pytest.mark.parametrize("attack", WORKS_WITHOUT)
def test_attack_works_without_a_sandbox(free, target, attack):
    assert run(free, HARMS[attack], target) == "harm"


@pytest.mark.parametrize("harm", attacks.SELF_HARM)
def test_solution_that_harms_itself_is_over_soon_and_the_next_one_runs(jail, target, harm):
    assert works(jail, target)
    begin = time.monotonic()
    assert run(jail, attacks.SELF_HARM[harm], target) in (b"", b"e", b"t", b"l")
    assert time.monotonic() - begin < 60
    assert works(jail, target)


def test_disk_is_watched_while_there_is_much_to_read(jail, target):
    """A thread says something all the time; what it says is no record, but keeps whoever reads it busy."""
    assert works(jail, target)
    code = f"{attacks.START}{attacks.FILL_WHILE_TALKING}\n"
    times = {"load_seconds": 10, "seconds": [9.0], "encode_seconds": 5, "idle_seconds": 9, "total_seconds": 9}
    chunks = jail.check({"part": "base", "solution": code, "stop_early": True, **times})
    with pytest.raises(StopIteration) as end:
        while True:
            next(chunks)
    assert end.value.value == "disk"
    assert works(jail, target)
