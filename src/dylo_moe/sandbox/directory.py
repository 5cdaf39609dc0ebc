"""The directory of a running solution: how full it is, and how it goes away whatever was made in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

MAX_BYTES, MAX_ENTRIES = 64 * 2**20, 2000


def overfull(directory: Path) -> bool:
    """Whether there is more in it than a solution may write, or something that hides."""
    size = entries = 0
    todo = [directory]
    while todo:
        try:
            found = list(os.scandir(todo.pop()))
            size += sum(entry.stat(follow_symlinks=False).st_size for entry in found)
            todo += [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:  # it is being written and removed
            continue
        except OSError:  # names too long to be followed, or permissions taken away
            return True
        entries += len(found)
        if size > MAX_BYTES or entries > MAX_ENTRIES:
            return True
    return False


def remove(directory: Path) -> None:
    """As far as it can be: what is nested too deeply for shutil, or made unreadable, goes by way of chmod and rm."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except RecursionError:
        pass
    if directory.exists():
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, str(directory)], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
