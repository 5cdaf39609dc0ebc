"""The child process that knows expected outputs and scores solutions. It runs canonical solutions, and no other code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from dylo_moe.checking import Checker
from dylo_moe.sandbox.jail import JailBroken
from dylo_moe.sandbox.level import Level
from dylo_moe.truth import Truth
from dylo_moe.worker import serve

KEPT_BYTES = 128 * 2**20  # of expected outputs; what is needed again is computed again


class Truths:
    """Tasks with their expected outputs; the latest are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Truth] = OrderedDict()

    def of(self, dataset: str, record: dict[str, Any]) -> Truth:
        key = record["task_id"]
        if key not in self._kept:
            self._kept[key] = Truth(dataset, record)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(truth.size for truth in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key]


def main() -> None:
    """Answers {"dataset", "task"} once its expected outputs are known, with the seconds that its canonical solution took, and
    {"level", "solution", "parts", "options"} with the statuses of the solution's parts.
    """
    truths = Truths()
    checkers: dict[Level, Checker] = {}
    truth: Truth | None = None

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        nonlocal truth
        if "task" in question:
            truth = truths.of(question["dataset"], question["task"])
            return {"seconds": truth.total_seconds}
        level = Level(**question["level"])
        checker = checkers.setdefault(level, Checker(level))
        try:
            return {part: checker.check(truth, part, question["solution"], question["options"]) for part in question["parts"]}
        except JailBroken as broken:
            return {"problem": str(broken)}

    serve(answer)
    for checker in checkers.values():
        checker.stop()


if __name__ == "__main__":
    main()
