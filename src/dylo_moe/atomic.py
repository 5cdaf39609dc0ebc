"""Files that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dylo_moe.errors import OutputError


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by a file with this content: written beside it, flushed to the disk, renamed.

    Raises:
        OutputError: `path` is as it was.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Replaces files that belong together: none of them before all are on the disk, so that a full one leaves the old ones.

    Missing directories are made. A kill between two renames leaves new files beside old ones, each of them whole.

    Raises:
        OutputError: the first file that cannot be written.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    for directory in {path.parent for path in files}:
        make_directory(directory)
    try:
        for path, data in files.items():
            with _named(path):
                _write(temporaries[path], data)
        for path, temporary in temporaries.items():
            with _named(path):
                os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed either
                temporary.unlink()
    for directory in {path.parent for path in files}:
        flush_directory(directory)


def make_directory(path: Path) -> None:
    """The directory and those above it, where they are missing. Raises OutputError."""
    with _named(path):
        path.mkdir(parents=True, exist_ok=True)


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


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        flush_to_disk(file.fileno())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error names the file that the user knows, and not the one beside it."""
    try:
        yield
    except OSError as error:
        raise OutputError(path, error) from error
