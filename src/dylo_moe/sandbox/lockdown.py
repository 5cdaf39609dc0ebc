"""Takes rights away from this process for good: before it runs what nobody has read."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from dylo_moe.sandbox import landlock, seccomp
from dylo_moe.sandbox.level import Level

FILE_BYTES = 16 * 2**20
OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITIES_3 = 0x20080522


def lock_down(level: Level, readable: list[str], directory: str) -> None:
    """What runs here from now on reads `readable` and writes in `directory`, and can do nothing to other processes.

    The memory is left to EvalPlus's guard, and the number of processes to seccomp, which allows no second one: RLIMIT_NPROC
    would count those of the user's other programs.

    Raises:
        OSError: a layer of the level is not there.
    """
    if not level.seccomp:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, OPEN_FILES)):
        _lower(limit, value)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows too large is an OSError
    if level.landlock:
        landlock.restrict(readable, [directory, os.devnull])
    _drop_capabilities(libc)
    seccomp.install()


def die_with_parent() -> None:
    """This process ends when the thread that started it does. On Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave_network(level: Level) -> None:
    """Moves this process into a network of its own where the level says so and the kernel lets it; else nothing happens."""
    if level.namespaces:
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root's powers: past file permissions, over hard limits, over other processes."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset refused to drop capabilities")
