"""EvalPlus's sanitizer with a time limit."""

from __future__ import annotations

from dylo_moe.errors import ScoringError, one_line
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
        self._unusable = ""

    def __enter__(self) -> Sanitizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def start(self) -> None:
        """Waits until there is a child; the first call of the sanitizer would.

        Raises:
            ScoringError: none starts, which no solution is to blame for.
        """
        try:
            if not self._unusable:
                self._worker.start()
        except WorkerGone as gone:
            self._unusable = one_line(f"the process that sanitizes solutions does not start: {gone}")
        if self._unusable:
            raise ScoringError(self._unusable)

    def __call__(self, solution: str, entry_point: str) -> tuple[str, str]:
        """Returns the sanitized solution and a note: empty, or why the solution was left as it is.

        A child that dies may have died of the machine: a second one is asked before the solution is blamed.

        Raises:
            ScoringError: as `start`.
        """
        for _ in range(2):
            self.start()
            try:
                return self._worker.ask({"solution": solution, "entry_point": entry_point}, self.seconds)["solution"], ""
            except WorkerGone as gone:
                if gone.late:
                    return solution, f"not sanitized: the sanitizer took more than {self.seconds:g} s"
        return solution, "not sanitized: the sanitizer failed"
