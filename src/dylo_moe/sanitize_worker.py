"""The child process that runs EvalPlus's sanitizer, whose time grows with the cube of the number of lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from dylo_moe.sandbox.ladder import candidates
from dylo_moe.sandbox.libraries import readable
from dylo_moe.sandbox.lockdown import lock_down
from dylo_moe.worker import limit_memory, serve

MEMORY_BYTES = 8 * 2**30


def light_sanitize() -> Callable[..., str]:
    """`evalplus.sanitize.sanitize` without the package datasets, for a process that does nothing else.

    evalplus.data imports datasets, and that pandas and pyarrow, for a function that is not called here: nine tenths of the time
    that this process took to start.
    """
    unused = ModuleType("datasets")
    unused.load_dataset = None
    sys.modules["datasets"] = unused
    from evalplus.sanitize import sanitize

    return sanitize


def _answer(sanitize: Callable[..., str], question: dict[str, Any]) -> dict[str, Any]:
    return {"solution": sanitize(question["solution"], entrypoint=question["entry_point"])}


def _hold() -> None:
    """The sanitizer runs nothing, but its parser is in C and reads what models write. Without Landlock it goes unheld."""
    for level in candidates()[-1:]:
        if not level.bwrap:
            lock_down(level, readable(), os.getcwd())


if __name__ == "__main__":
    limit_memory(MEMORY_BYTES)
    answer = partial(_answer, light_sanitize())  # before files are out of reach
    _hold()
    serve(answer)
