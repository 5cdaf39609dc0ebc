"""The child process that runs EvalPlus's sanitizer, whose time grows with the cube of the number of lines."""

from __future__ import annotations

import os
from typing import Any

from evalplus.sanitize import sanitize

from dylo_moe.sandbox.ladder import candidates
from dylo_moe.sandbox.libraries import readable
from dylo_moe.sandbox.lockdown import lock_down
from dylo_moe.worker import limit_memory, serve

MEMORY_BYTES = 8 * 2**30


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    return {"solution": sanitize(question["solution"], entrypoint=question["entry_point"])}


def _hold() -> None:
    """The sanitizer runs nothing, but its parser is in C and reads what models write. Without Landlock it goes unheld."""
    for level in candidates()[-1:]:
        if not level.bwrap:
            lock_down(level, readable(), os.getcwd())


if __name__ == "__main__":
    limit_memory(MEMORY_BYTES)
    _hold()
    serve(_answer)
