"""Scores solutions of known text with EvalPlus's own checker, in a fresh interpreter.

For text that the judge wrote itself: there is no sandbox beyond EvalPlus's. A fresh interpreter, because EvalPlus forks its
checker from the caller and counts the caller's memory, so that right answers fail under a process that holds a model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

TIME_LIMIT = 30.0  # seconds per input; with EvalPlus's one second, right answers fail on a loaded machine
DEADLINE = 600.0


def score(dataset: str, records: Iterable[dict], solutions: dict[str, str]) -> dict[str, bool]:
    """task id -> whether the solution (a whole program) passes the base and the plus inputs of its record."""
    question = {"dataset": dataset, "records": list(records), "solutions": solutions}
    process = subprocess.run(
        [sys.executable, "-P", __file__], input=json.dumps(question), text=True, capture_output=True, timeout=DEADLINE
    )
    if process.returncode != 0:
        raise RuntimeError(f"EvalPlus's checker ended with {process.returncode}: {process.stderr.strip()[-400:]}")
    return json.loads(process.stdout)


def _passes(dataset: str, record: dict, solution: str) -> bool:
    from evalplus.eval import PASS, untrusted_check
    from evalplus.gen.util import trusted_exec

    for inputs in (record["base_input"], record["plus_input"]):
        program, entry = record["prompt"] + record["canonical_solution"], record["entry_point"]
        expected, seconds = trusted_exec(program, inputs, entry, record_time=True)
        status, _ = untrusted_check(
            dataset, solution, inputs, entry, expected, record["atol"], seconds, fast_check=True, min_time_limit=TIME_LIMIT
        )
        if status != PASS:
            return False
    return True


def main() -> None:
    question = json.load(sys.stdin)
    records = {record["task_id"]: record for record in question["records"]}
    passed = {task: _passes(question["dataset"], records[task], text) for task, text in question["solutions"].items()}
    json.dump(passed, sys.stdout)


if __name__ == "__main__":
    main()
