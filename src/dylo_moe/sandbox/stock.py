"""EvalPlus's own check of a solution, for the score as EvalPlus 0.3.1 would give it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

from evalplus.eval import FAIL, PASS, untrusted_check
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.gen.util import trusted_exec

# EvalPlus ends a check after 60 s whatever its inputs are allowed. Mbpp/599's canonical solution takes 20 s on an idle core, and
# more than 60 s on a loaded one, so inputs are checked in runs of so many seconds of the canonical solution each.
RUN_SECONDS = 5.0


class Task:
    """A task with what its canonical solution returns, which EvalPlus compares with in the process that runs the solution."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.dataset: str = task["dataset"]
        self.entry_point: str = task["entry_point"]
        self.atol: float = task["atol"]
        self.inputs: dict[str, list[list]] = task["inputs"]
        self.seconds: dict[str, list[float]] = task["seconds"]
        not_none = self.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
        self.expected = {
            part: trusted_exec(task["canonical"], inputs, self.entry_point, output_not_none=not_none)
            for part, inputs in self.inputs.items()
        }

    def run(self, question: dict[str, Any], pipe: int, lock: Callable[[], None]) -> None:
        """Writes the status as JSON. `lock` is called in the process that EvalPlus forks, before anything else."""
        tempfile.tempdir = os.getcwd()

        def before_it_runs() -> None:
            os.close(pipe)
            lock()

        os.register_at_fork(after_in_child=before_it_runs)
        os.write(pipe, json.dumps(self._check(question["part"], question["solution"], question["options"])).encode())

    def _check(self, part: str, solution: str, options: dict[str, Any]) -> str:
        """The first status of its runs that is not "pass"."""
        for run in runs(self.seconds[part]):
            inputs, expected, seconds = self.inputs[part][run], self.expected[part][run], self.seconds[part][run]
            try:
                status, _ = untrusted_check(
                    self.dataset, solution, inputs, self.entry_point, expected, self.atol, seconds, **options
                )
            except KeyError:  # a status that EvalPlus does not know, written by the solution
                status = FAIL
            if status != PASS:
                return status
        return PASS


def runs(seconds: list[float]) -> list[slice]:
    """Consecutive inputs that take the canonical solution at most RUN_SECONDS together, or one that takes more."""
    starts, total = [0], 0.0
    for index, took in enumerate(seconds):
        if index > starts[-1] and total + took > RUN_SECONDS:
            starts, total = [*starts, index], 0.0
        total += took
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(seconds)], strict=True)]
