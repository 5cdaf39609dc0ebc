"""A directory that is not there until it is complete: filled beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dylo_moe.errors import UnreadableFile


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A private directory beside `target`, for the caller to fill and rename; what is left of it in the end is removed.

    It has the permissions that a directory of the user has.

    Raises:
        UnreadableFile: the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            os.chmod(scratch, 0o777 & ~_umask())
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UnreadableFile(target, "", found=f"error {error.strerror}", expected="a writable directory") from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
