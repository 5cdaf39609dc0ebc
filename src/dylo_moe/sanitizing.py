"""EvalPlus's sanitizer with a time limit."""

from __future__ import annotations

from dylo_moe.worker import Worker, WorkerGone

SANITIZE_SECONDS = 30.0


class Sanitizer:
    """Extracts the entry point and what it needs from a solution, as EvalPlus does, in a child process.

    Use as a context manager.

    Args:
        seconds: the limit for one solution.
    """

    def __init__(self, seconds: float = SANITIZE_SECONDS) -> None:
        self.seconds = seconds
        self._worker = Worker("dylo_moe.sanitize_worker")

    def __enter__(self) -> Sanitizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def __call__(self, solution: str, entry_point: str) -> tuple[str, str]:
        """Returns the sanitized solution and a note: empty, or why the solution was left as it is."""
        try:
            answer = self._worker.ask({"solution": solution, "entry_point": entry_point}, self.seconds)
        except WorkerGone as gone:
            why = f"took more than {self.seconds:g} s" if gone.late else "failed"
            return solution, f"not sanitized: the sanitizer {why}"
        return answer["solution"], ""
