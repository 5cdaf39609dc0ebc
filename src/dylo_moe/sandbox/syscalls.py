"""System calls by name and number: what code that computes needs, for the two machines that we know the numbers of."""

from __future__ import annotations

# AUDIT_ARCH_* of linux/audit.h. Without it a filter could be passed by with another machine's numbers.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64), as in asm/unistd_64.h and asm-generic/unistd.h
# fmt: off
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23), "dup3": (292, 24), "pipe2": (293, 59),
    "ppoll": (271, 73), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    "sendfile": (40, 71), "splice": (275, 76), "copy_file_range": (326, 285), "openat": (257, 56), "openat2": (437, 437),
    "readlinkat": (267, 78), "faccessat": (269, 48), "faccessat2": (439, 439), "fstat": (5, 80), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38),
    "renameat2": (316, 276), "symlinkat": (266, 36), "linkat": (265, 37), "ftruncate": (77, 46), "truncate": (76, 45),
    "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223), "umask": (95, 166),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233), "brk": (12, 214),
    "mincore": (27, 232), "msync": (26, 227), "mlock": (149, 228), "munlock": (150, 229), "membarrier": (324, 283),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "futex": (202, 98),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "restart_syscall": (219, 128),
    "exit": (60, 93), "exit_group": (231, 94), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getpgid": (121, 155), "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "getpriority": (140, 141), "getrusage": (98, 165), "getrlimit": (97, 163), "times": (100, 153), "sysinfo": (99, 179),
    "uname": (63, 160), "getrandom": (318, 278), "getcpu": (309, 168), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "setitimer": (38, 103), "getitimer": (36, 102), "timer_create": (222, 107), "timer_settime": (223, 110),
    "timer_gettime": (224, 108), "timer_delete": (226, 111), "shutdown": (48, 210), "recvfrom": (45, 207),
    "recvmsg": (47, 212), "getsockopt": (55, 209), "getsockname": (51, 204), "getpeername": (52, 205), "wait4": (61, 260),
    "waitid": (247, 95),
}

# Calls that only x86_64 has: older forms of some of the above.
ONLY_X86_64 = {
    "open": 2, "stat": 4, "lstat": 6, "access": 21, "pipe": 22, "poll": 7, "select": 23, "epoll_wait": 232,
    "epoll_create": 213, "eventfd": 284, "dup2": 33, "getdents": 78, "mkdir": 83, "rmdir": 84, "unlink": 87, "rename": 82,
    "symlink": 88, "link": 86, "readlink": 89, "creat": 85, "time": 201, "getpgrp": 111, "arch_prctl": 158, "alarm": 37,
    "pause": 34,
}
# fmt: on

# Allowed with certain arguments only; seccomp.py says which.
CHECKED = {
    "clone": (56, 220),
    "fcntl": (72, 25),
    "kill": (62, 129),
    "prlimit64": (302, 261),
    "sendto": (44, 206),
    "socketpair": (53, 199),
    "tgkill": (234, 131),
}
# Refused with an error number of their own, which makes callers take another way.
REFUSED = {"clone3": (435, 435), "ioctl": (16, 29)}


def number(name: str, machine: str) -> int:
    """Raises KeyError for a call that this machine does not have, or that is not listed."""
    if machine == "x86_64" and name in ONLY_X86_64:
        return ONLY_X86_64[name]
    table = next((table for table in (ALLOWED, CHECKED, REFUSED) if name in table), ALLOWED)
    return table[name][list(MACHINES).index(machine)]
