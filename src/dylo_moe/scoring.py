"""Runs solutions in a sandbox and says which pass."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from dylo_moe.errors import OptionError, ScoringError
from dylo_moe.sandbox.ladder import SANDBOXES, choose
from dylo_moe.sandbox.level import NONE
from dylo_moe.tasks import TaskSet
from dylo_moe.worker import Worker, WorkerGone

PASS, FAIL, LATE = "pass", "fail", "timeout"
TRUTH_SECONDS = 300.0
CHECK_SECONDS = 600.0  # for the worker to answer, besides the time that canonical solutions take; it has limits of its own
MIN_TIME_LIMIT = 4.0  # EvalPlus's main branch; 1 s fails canonical solutions on a loaded machine
_NAMED = 8


@dataclass(frozen=True)
class Limits:
    """How to run. Seconds per input are max(min_time_limit, gt_time_limit_factor * the canonical solution's)."""

    base_only: bool = False
    test_details: bool = False
    min_time_limit: float = MIN_TIME_LIMIT
    gt_time_limit_factor: float = 4.0

    @property
    def parts(self) -> list[str]:
        return ["base"] if self.base_only else ["base", "plus"]

    def options(self) -> dict[str, Any]:
        """What `checking.Checker.check` reads."""
        return {
            "fast_check": not self.test_details,
            "min_time_limit": self.min_time_limit,
            "gt_time_limit_factor": self.gt_time_limit_factor,
        }


@dataclass(frozen=True)
class Sample:
    """One solution of one task. index counts the samples of a task from 0, in the order of their file."""

    task_id: str
    index: int
    solution: str


@dataclass(frozen=True)
class Score:
    """What became of one sample. parts: "base" and "plus" -> {"stock", "ours", "reason", "seconds", "failed"}.

    Statuses are "pass", "fail" and "timeout"; "stock" is EvalPlus's own.
    """

    sample: Sample
    parts: dict[str, dict[str, Any]]
    measured_alone: bool = False

    def passed(self, which: str, parts: Sequence[str]) -> bool:
        """which: "stock" or "ours"."""
        return all(self.parts[part][which] == PASS for part in parts)


class Scorer:
    """Scores samples of one task set. Use as a context manager.

    Generated code runs in a sandbox that never learns the expected outputs, and what it returns is compared outside.
    EvalPlus's own check runs in another one, for the score as EvalPlus gives it.

    Args:
        parallel: processes that score, each with two sandboxes of which one at a time works; None for half the processors.
        sandbox: "auto" (the strongest that holds on this machine, or else an error), "bwrap" (that or an error), or "none".

    Attributes:
        sandbox: the level in use, for the results: "bwrap+landlock+seccomp", "landlock+seccomp", ... or "none".

    Raises:
        OptionError: no such sandbox. ScoringError: it does not hold here.
    """

    def __init__(self, task_set: TaskSet, limits: Limits, *, parallel: int | None = None, sandbox: str = "auto") -> None:
        if sandbox not in SANDBOXES:
            raise OptionError(f"sandbox {sandbox!r}, but should be one of {', '.join(SANDBOXES)}")
        self.task_set = task_set
        self.limits = limits
        self._level = choose(sandbox)
        self.sandbox = self._level.name
        self._workers = [Worker("dylo_moe.scoring_worker") for _ in range(max(1, parallel or (os.cpu_count() or 2) // 2))]
        _announce(self.sandbox)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def calibrate(self, task_ids: Iterable[str]) -> None:
        """Runs the canonical solutions of these tasks as if they were samples.

        Raises:
            ScoringError: one of them does not pass, so that no score would mean anything. The message names such tasks.
        """
        tasks = self.task_set.tasks
        canonical = [Sample(task, 0, tasks[task]["prompt"] + tasks[task]["canonical_solution"]) for task in task_ids]
        scores = self._score(canonical, {**self.limits.options(), "stock": False})
        failed = [f"{s.sample.task_id} ({_worst(s)})" for s in scores if not s.passed("ours", self.limits.parts)]
        if failed:
            names = ", ".join(failed[:_NAMED]) + (", ..." if len(failed) > _NAMED else "")
            raise ScoringError(f"{self.task_set.path}: no score, as {len(failed)} canonical solutions do not pass: {names}")

    def score(self, samples: Iterable[Sample]) -> list[Score]:
        """Scores every sample; the result is in the order of the samples.

        Tasks are spread over processes. A sample that ran into a time limit is measured again alone when the others are done,
        so that a loaded machine does not decide.

        Raises:
            ScoringError: a canonical solution cannot be run, or a process does not start.
        """
        return self._score(list(samples), {**self.limits.options(), "stock": True})

    def _score(self, samples: list[Sample], options: dict[str, Any]) -> list[Score]:
        by_task: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_task[sample.task_id].append(sample)
        workers = self._workers[: max(1, len(by_task))]
        shares = [list(by_task.values())[i :: len(workers)] for i in range(len(workers))]
        with ThreadPoolExecutor(len(workers)) as pool:
            futures = [pool.submit(self._score_share, *pair, options) for pair in zip(workers, shares, strict=True)]
            scored = [score for future in futures for score in future.result()]
        results = {(s.sample.task_id, s.sample.index): s for s in scored}
        slow = [s.sample for s in scored if _ran_out_of_time(s, self.limits)]
        for again in self._score_share(self._workers[0], [[sample] for sample in slow], options):
            results[again.sample.task_id, again.sample.index] = Score(again.sample, again.parts, measured_alone=True)
        return [results[sample.task_id, sample.index] for sample in samples]

    def _score_share(self, worker: Worker, groups: Iterable[list[Sample]], options: dict[str, Any]) -> list[Score]:
        scores = []
        for group in groups:
            seconds = 0.0
            for sample in group:
                seconds = seconds or self._prepare(worker, sample.task_id)
                parts = self._check(worker, sample, options, seconds)
                scores.append(Score(sample, parts or _lost(self.limits)))
                seconds = seconds if parts else 0.0
        return scores

    def _prepare(self, worker: Worker, task_id: str) -> float:
        """Makes the worker ready for a task; returns the seconds within which it answers for one sample."""
        task_set = self.task_set
        try:
            answer = worker.ask({"dataset": task_set.dataset, "task": task_set.tasks[task_id]}, TRUTH_SECONDS)
        except WorkerGone as gone:
            raise ScoringError(f"{task_set.path}: {task_id}: its canonical solution cannot be run: {gone}") from None
        return CHECK_SECONDS + 4 * self.limits.gt_time_limit_factor * answer["seconds"]

    def _check(self, worker: Worker, sample: Sample, options: dict[str, Any], seconds: float) -> dict[str, dict] | None:
        """The statuses of one sample; None if the worker did not survive it."""
        question = {"level": self._level.as_dict(), "solution": sample.solution, "parts": self.limits.parts, "options": options}
        try:
            answer = worker.ask(question, seconds)
        except WorkerGone:
            return None
        if "problem" in answer:
            raise ScoringError(f"{sample.task_id}: {answer['problem']}")
        return answer


def score(task_set: TaskSet, samples: Iterable[Sample], limits: Limits, *, parallel: int | None = None) -> list[Score]:
    """`Scorer.score`, once."""
    with Scorer(task_set, limits, parallel=parallel) as scorer:
        return scorer.score(samples)


@cache
def _announce(sandbox: str) -> None:
    """Once per process and level."""
    held = "without a sandbox: use a machine that may be lost" if sandbox == NONE.name else f"in a sandbox: {sandbox}"
    print(f"Generated code runs {held}.", file=sys.stderr)


def _worst(score: Score) -> str:
    return next(part["ours"] for part in score.parts.values() if part["ours"] != PASS)


def _lost(limits: Limits) -> dict[str, dict[str, Any]]:
    """Code that breaks or outlasts the process that judges it has failed."""
    lost = {"stock": FAIL, "ours": FAIL, "reason": "", "seconds": 0.0, "failed": []}
    return dict.fromkeys(limits.parts, lost)


def _ran_out_of_time(score: Score, limits: Limits) -> bool:
    return any(
        part["ours"] == LATE or (part["ours"] == PASS != part["stock"] and part["seconds"] >= limits.min_time_limit)
        for part in score.parts.values()
    )
