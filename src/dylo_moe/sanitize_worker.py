"""The child process that runs EvalPlus's sanitizer, whose time grows with the cube of the number of lines."""

from __future__ import annotations

from typing import Any

from evalplus.sanitize import sanitize

from dylo_moe.worker import limit_memory, serve

MEMORY_BYTES = 8 * 2**30


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    return {"solution": sanitize(question["solution"], entrypoint=question["entry_point"])}


if __name__ == "__main__":
    limit_memory(MEMORY_BYTES)
    serve(_answer)
