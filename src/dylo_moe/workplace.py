"""Directories of processes that may be killed: what the dead leave on a machine, the next one there takes away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from pathlib import Path

from dylo_moe.sandbox.directory import remove

_PREFIX = "dylo-moe-place-"
# Between its creation and its lock a directory looks like that of a dead process.
_SECONDS_TO_LOCK = 60.0


class Workplace:
    """A new empty directory for temporary files. It is locked as long as this process lives, however that ends.

    Attributes:
        path: the directory.
    """

    def __init__(self) -> None:
        for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            if _is_dead(leftover):
                remove(leftover)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _locked(self.path)

    def remove(self) -> None:
        """The directory, with all that is in it."""
        remove(self.path)
        os.close(self._lock)


def _locked(directory: Path) -> int:
    """A descriptor of the directory that holds its lock. Raises OSError where another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_dead(directory: Path) -> bool:
    """Whether it is one of ours, this user's, and its process is gone."""
    with contextlib.suppress(OSError):
        found = directory.lstat()
        young = time.time() - found.st_mtime < _SECONDS_TO_LOCK
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not young:
            os.close(_locked(directory))
            return True
    return False
