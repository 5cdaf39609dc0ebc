"""Files that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by a file with this content: written beside it, flushed to the disk, renamed.

    Raises:
        OSError: it names `path` and the reason; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            flush_to_disk(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of `write_atomically(path, ...)`. Only for whoever alone writes `path`."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    os.fsync(descriptor)


def flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
