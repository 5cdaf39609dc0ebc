"""Attacks on a sandbox before it is relied on. Each must be refused, and an honest solution must run."""

from __future__ import annotations

import os
import socket
import tempfile
from functools import cache
from pathlib import Path

from dylo_moe.sandbox.decoding import Damaged, decode
from dylo_moe.sandbox.jail import Jail, JailBroken
from dylo_moe.sandbox.level import Level
from dylo_moe.sandbox.records import ERROR, VALUE, read_records

_SECONDS = 10.0
_HONEST = "run an honest solution"
# Past EvalPlus's guard, which only hides names of the modules os, shutil, subprocess and builtins.
_ATTACK = f"""
import io, posix, socket

def connect(port):
    socket.create_connection(("127.0.0.1", port), 2).close()

def read(path):
    return io.open(path).read()

def write(path):
    io.open(path, "w").close()

def fork(_):
    pid = posix.fork()
    if pid == 0:
        posix._exit(0)
    return pid

def signal(_):
    posix.kill(posix.getppid(), 0)

def attack(what, target):
    if what == {_HONEST!r}:
        return target
    return [globals()[what](target)]
"""


@cache
def problems(level: Level) -> tuple[str, ...]:
    """What a solution could do at this level although it must not, in words; nothing for a level that holds.

    The attacks are run as solutions are, once per level and process.
    """
    with tempfile.TemporaryDirectory(prefix="dylo-moe-") as directory, socket.create_server(("127.0.0.1", 0)) as server:
        secret, new = Path(directory, "secret"), Path(directory, "new")
        secret.write_text("secret")
        targets = {
            _HONEST: "yes",
            "connect": server.getsockname()[1],
            "read": str(secret),
            "write": str(new),
            "fork": os.getpid(),
            "signal": os.getpid(),
        }
        try:
            found = _run(level, [[what, target] for what, target in targets.items()])
        except JailBroken as broken:
            return (str(broken),)
        written = ["write a file outside its directory"] * new.exists()
    (honest, value), *attacks = [*found, (b"", b"")] if found else [(b"", b"")]
    if honest != VALUE or _value(value) != "yes":
        return ("an honest solution does not run",)
    refused = [kind == ERROR for kind, _ in attacks] + [False] * len(targets)
    return (*written, *(f"a solution can {what}" for what, held in zip(list(targets)[1:], refused, strict=False) if not held))


def _run(level: Level, inputs: list[list]) -> list[tuple[bytes, bytes]]:
    with Jail(level) as jail:
        jail.load({"stock": False, "entry_point": "attack", "inputs": {"base": inputs}, "as_set": False})
        jail.finish_load(_SECONDS)
        times = {
            "load_seconds": _SECONDS,
            "encode_seconds": _SECONDS,
            "seconds": [_SECONDS] * len(inputs),
            "idle_seconds": 2 * _SECONDS,
            "total_seconds": 3 * _SECONDS,
        }
        return list(read_records(jail.check({"part": "base", "solution": _ATTACK, "stop_early": False, **times}), 2**20))[1:]


def _value(data: bytes) -> object:
    try:
        return decode(data)
    except Damaged:
        return None
