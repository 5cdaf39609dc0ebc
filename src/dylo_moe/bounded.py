"""What a process does with values from generated code has an end: a few bytes can stand for years of work, or for terabytes."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZES = Path("/proc/self/statm")  # in pages, the address space first


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Within it this process may use so much processor time, or it is killed, and so many more bytes, or MemoryError is raised.

    Killed by a signal without a handler, because nothing else ends a loop in C. Processor time, because a loaded machine should
    not decide. The memory is that of the address space; where the system does not say how large it is now, it has no limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if _SIZES.exists():
        size = int(_SIZES.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (size if soft == resource.RLIM_INFINITY else min(size, soft), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
