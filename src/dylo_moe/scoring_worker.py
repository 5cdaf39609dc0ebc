"""The child process that computes expected outputs and runs generated code, with EvalPlus's own `untrusted_check`.

Two statuses come out of every check: EvalPlus's, and ours, which differs where EvalPlus 0.3.1 compares wrongly:

* HumanEval/32: `find_zero`'s oracle forgets to count the input as passed, so no solution can pass. Ours asks the same
  question (is |p(x)| <= atol) in a way that is counted.
* A tolerance that EvalPlus sets at the first float stays for later inputs, where a wrong integer may then pass, and
  np.allclose broadcasts, so [[0.3]] passes for [0.3]. Ours compares each input with its own tolerance, and shapes too.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from typing import Any

import numpy as np
from evalplus.data.mbpp import mbpp_deserialize_inputs, mbpp_serialize_inputs
from evalplus.eval import PASS, is_floats, untrusted_check
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS, MBPP_OUTPUT_SET_EQ_TASKS
from evalplus.gen.util import trusted_exec

from dylo_moe.worker import serve

FLOAT_ATOL = 1e-6  # EvalPlus's, for expected floats where the task gives no tolerance
FLOAT_RTOL = 1e-7
# EvalPlus ends a check after 60 s whatever its inputs are allowed. Mbpp/599's canonical solution takes 20 s on an idle core, and
# more than 60 s on a loaded one, so inputs are checked in runs of so many seconds of the canonical solution each.
RUN_SECONDS = 5.0
ROOT_REASON = "EvalPlus never counts an input of HumanEval/32 as passed"
COMPARISON_REASON = "EvalPlus keeps the tolerance of an earlier input, or broadcasts"
_ROOT_ENTRY = "dylo_moe_is_root"
_ROOT_CHECK = """

def {entry}(coefficients):
    import math
    root = find_zero(coefficients)
    return bool(abs(sum([c * math.pow(root, i) for i, c in enumerate(coefficients)])) <= {atol!r})
"""


class Expected:
    """Stands for an expected output; equality is the whole comparison, so that EvalPlus adds none of its own."""

    __hash__ = None
    __array_ufunc__ = None  # lets `array == Expected(...)` come here instead of comparing element by element

    def __init__(self, value: Any, atol: float) -> None:
        self.value = value
        self.atol = atol or (FLOAT_ATOL if is_floats(value) else 0)

    def __eq__(self, out: object) -> bool:
        if bool(out == self.value):
            return True
        if self.atol == 0 or type(out) is not type(self.value):
            return False
        got, wanted = np.asarray(out), np.asarray(self.value)
        return got.shape == wanted.shape and bool(np.allclose(got, wanted, rtol=FLOAT_RTOL, atol=self.atol))


class Task:
    """One task with its expected outputs, computed from the canonical solution. `parts`: "base" and "plus" -> inputs."""

    def __init__(self, dataset: str, record: dict[str, Any]) -> None:
        self.dataset = dataset
        self.id, self.entry_point, self.atol = record["task_id"], record["entry_point"], record["atol"]
        self.parts: dict[str, list] = {}
        self.expected: dict[str, list] = {}
        self.seconds: dict[str, list[float]] = {}
        for part in ("base", "plus"):
            inputs = record[f"{part}_input"]
            self.parts[part] = list(mbpp_deserialize_inputs(self.id, inputs) if dataset == "mbpp" else inputs)
            self.expected[part], self.seconds[part] = trusted_exec(
                record["prompt"] + record["canonical_solution"],
                self.parts[part],
                self.entry_point,
                record_time=True,
                output_not_none=self.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS,
            )
        self.runs = {part: _runs(seconds) for part, seconds in self.seconds.items()}

    def check(self, part: str, solution: str, options: dict[str, Any]) -> dict[str, Any]:
        """Statuses of one solution on one part: {"stock", "ours", "reason", "seconds", "failed"}.

        `seconds` is the wall time of the slower run, `failed` the inputs that failed.
        """
        begin = time.monotonic()
        stock, details = self._run(part, solution, self.entry_point, self.expected[part], options)
        seconds = time.monotonic() - begin
        ours, reason = stock, ""
        if self.dataset == "humaneval" and self.entry_point == "find_zero":
            begin = time.monotonic()
            code = solution + _ROOT_CHECK.format(entry=_ROOT_ENTRY, atol=self.atol)
            ours, details = self._run(part, code, _ROOT_ENTRY, [True] * len(self.parts[part]), options)
            seconds, reason = max(seconds, time.monotonic() - begin), ROOT_REASON
        elif stock == PASS and self._comparison_matters(part):
            strict = [Expected(value, self.atol) for value in self.expected[part]]
            ours, details = self._run(part, solution, self.entry_point, strict, options)
            reason = COMPARISON_REASON
        failed = [] if ours == PASS else self._failed(part, details, options["fast_check"])
        return {"stock": stock, "ours": ours, "reason": reason * (ours != stock), "seconds": seconds, "failed": failed}

    def _run(self, part: str, code: str, entry_point: str, expected: list, options: dict[str, Any]) -> tuple[str, list[int]]:
        atol = self.atol if expected is self.expected[part] else 0
        status, details = PASS, []
        for run in self.runs[part]:
            inputs, seconds = self.parts[part][run], self.seconds[part][run]
            found, more = untrusted_check(self.dataset, code, inputs, entry_point, expected[run], atol, seconds, **options)
            details += list(more)
            status = found if status == PASS else status
            if status != PASS and options["fast_check"]:
                break
        return status, details

    def _comparison_matters(self, part: str) -> bool:
        """Whether any comparison of this task may use a tolerance; without one both comparisons are `==`."""
        if self.dataset == "mbpp" and self.entry_point in (*MBPP_OUTPUT_SET_EQ_TASKS, *MBPP_OUTPUT_NOT_NONE_TASKS):
            return False
        return self.atol != 0 or any(is_floats(value) for value in self.expected[part])

    def _failed(self, part: str, details: list[int], only_last: bool) -> list:
        inputs = self.parts[part]
        if not details:
            return []
        failed = [inputs[len(details) - 1]] if only_last else [x for x, ok in zip(inputs, details, strict=False) if not ok]
        failed = mbpp_serialize_inputs(self.id, failed) if self.dataset == "mbpp" else failed
        return json.loads(json.dumps(failed, default=repr))


def _runs(seconds: list[float]) -> list[slice]:
    """Consecutive inputs that take the canonical solution at most RUN_SECONDS together, or one that takes more."""
    starts, total = [0], 0.0
    for index, took in enumerate(seconds):
        if index > starts[-1] and total + took > RUN_SECONDS:
            starts, total = [*starts, index], 0.0
        total += took
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(seconds)], strict=True)]


def main() -> None:
    """Answers {"dataset", "task"} once its expected outputs are known, with the number of runs that one solution takes at
    most, and {"solution", "parts", "options"} with the statuses of its parts.
    """
    multiprocessing.set_start_method("fork")  # EvalPlus hands Values and Arrays over; this process holds no model
    task: Task | None = None

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        nonlocal task
        if "task" in question:
            task = Task(question["dataset"], question["task"])
            return {"runs": 2 * sum(map(len, task.runs.values()))}
        return {part: task.check(part, question["solution"], question["options"]) for part in question["parts"]}

    serve(answer)


if __name__ == "__main__":
    main()
