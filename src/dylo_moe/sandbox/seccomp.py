"""A seccomp filter: every system call that is not listed is refused, for this process and whatever comes of it, for good.

What is left cannot make a process, run a program, open a socket, signal or trace another process, or change its limits. A
refused call fails with EPERM, so that Python raises PermissionError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

from dylo_moe.sandbox.syscalls import ALLOWED, MACHINES, ONLY_X86_64, number

CLONE_THREAD = 0x10000
AF_UNIX = 1
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. With F_SETOWN and F_SETSIG one could signal any process.
_FCNTL = (0, 1, 2, 3, 4, 1030)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
# linux/bpf_common.h and linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True)
class Check:
    """Lets a call through if the argument is one of `values`, or has one of the bits of `mask`."""

    name: str
    argument: int
    values: tuple[int, ...] = ()
    mask: int = 0

    def instructions(self) -> list[Instruction]:
        low, high = _ARGUMENTS + 8 * self.argument, _ARGUMENTS + 8 * self.argument + 4
        if self.mask:
            return [(_LOAD, 0, 0, low), (_IF_SET, 0, 1, self.mask), _returns(_ALLOW), _returns(_ERRNO | errno.EPERM)]
        found: list[Instruction] = []
        for value in self.values:
            found += [(_LOAD, 0, 0, low), (_IF_EQUAL, 0, 3, value), (_LOAD, 0, 0, high), (_IF_EQUAL, 0, 1, 0), _returns(_ALLOW)]
        return [*found, _returns(_ERRNO | errno.EPERM)]


def checks(pid: int) -> list[Check]:
    """For the process `pid`: threads only, signals to itself only, no address outside."""
    return [
        Check("clone", 0, mask=CLONE_THREAD),
        Check("fcntl", 1, _FCNTL),
        Check("kill", 0, (pid,)),
        Check("tgkill", 0, (pid,)),
        Check("prlimit64", 0, (0,)),
        Check("socketpair", 0, (AF_UNIX,)),
        Check("sendto", 4, (0,)),  # a datagram socket may otherwise name any other as its receiver
    ]


def program(machine: str, pid: int) -> bytes:
    """The filter as an array of struct sock_filter.

    Args:
        machine: "x86_64" or "aarch64"; another machine's calls kill the process.
        pid: of the process that the filter is for.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _MACHINE),
        (_IF_EQUAL, 1, 0, MACHINES[machine]),
        _returns(_KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for name in (*ALLOWED, *(ONLY_X86_64 if machine == "x86_64" else ())):
        code += [(_IF_EQUAL, 0, 1, number(name, machine)), _returns(_ALLOW)]
    for check in checks(pid):
        block = check.instructions()
        code += [(_IF_EQUAL, 0, len(block), number(check.name, machine)), *block]
    for name, reason in (("clone3", errno.ENOSYS), ("ioctl", errno.ENOTTY)):
        code += [(_IF_EQUAL, 0, 1, number(name, machine)), _returns(_ERRNO | reason)]
    code.append(_returns(_ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _returns(action: int) -> Instruction:
    return _RETURN, 0, 0, action


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install() -> None:
    """Puts the filter on this process.

    Raises:
        OSError: the machine is not known, or the kernel has no seccomp.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(machine, os.getpid())
    argument = _Program(len(code) // 8, code)
    forbid_new_privileges(libc)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(argument), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp refused the filter")


def forbid_new_privileges(libc: ctypes.CDLL) -> None:
    """Set-user-id programs give nothing from here on; an ordinary user needs this before a filter or a Landlock rule."""
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl refused PR_SET_NO_NEW_PRIVS")
