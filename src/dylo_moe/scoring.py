"""Runs solutions in fresh processes and says which pass."""

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
from dylo_moe.tasks import TaskSet
from dylo_moe.worker import Worker, WorkerGone

PASS, FAIL = "pass", "fail"
RUN_SECONDS = 70.0  # EvalPlus gives one run at most 60 s, and a few more to end
TRUTH_SECONDS = 300.0
MIN_TIME_LIMIT = 4.0  # EvalPlus's main branch; 1 s fails canonical solutions on a loaded machine


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

    def for_evalplus(self) -> dict[str, Any]:
        """Keyword arguments of EvalPlus's `untrusted_check`."""
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
    """What became of one sample. parts: "base" and "plus" -> {"stock", "ours", "reason", "seconds", "failed"}."""

    sample: Sample
    parts: dict[str, dict[str, Any]]
    measured_alone: bool = False

    def passed(self, which: str, parts: Sequence[str]) -> bool:
        """which: "stock" or "ours"."""
        return all(self.parts[part][which] == PASS for part in parts)


SANDBOXES = ("auto", "bwrap", "none")


class Scorer:
    """Scores samples of one task set. Use as a context manager.

    Args:
        parallel: processes that run code; None for half the processors.
        sandbox: one of SANDBOXES.

    Attributes:
        sandbox: the level in use, for the results.
    """

    def __init__(self, task_set: TaskSet, limits: Limits, *, parallel: int | None = None, sandbox: str = "auto") -> None:
        if sandbox not in SANDBOXES:
            raise OptionError(f"sandbox {sandbox!r}, but should be one of {', '.join(SANDBOXES)}")
        self.task_set = task_set
        self.limits = limits
        self.sandbox = "none"
        self._parallel = parallel or (os.cpu_count() or 2) // 2

    def __enter__(self) -> Scorer:
        _say_unsandboxed()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def calibrate(self, task_ids: Iterable[str]) -> None:
        """Scores the canonical solutions of these tasks as if they were samples.

        Raises:
            ScoringError: one of them does not pass, so that no score would mean anything. The message names such tasks.
        """
        tasks = self.task_set.tasks
        canonical = [Sample(task, 0, tasks[task]["prompt"] + tasks[task]["canonical_solution"]) for task in task_ids]
        failed = [found.sample.task_id for found in self.score(canonical) if not found.passed("ours", self.limits.parts)]
        if failed:
            names = ", ".join(failed[:8]) + (", ..." if len(failed) > 8 else "")
            raise ScoringError(f"{self.task_set.path}: canonical solutions fail for {len(failed)} tasks, no score: {names}")

    def score(self, samples: Iterable[Sample]) -> list[Score]:
        """Scores every sample; the result is in the order of the samples.

        Tasks are spread over processes. A sample that failed and ran into a time limit is measured again alone when the
        others are done, so that a loaded machine does not decide.

        Raises:
            ScoringError: a canonical solution fails, or the scoring process does not start.
        """
        samples = list(samples)
        by_task: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_task[sample.task_id].append(sample)
        workers = max(1, min(self._parallel, len(by_task)))
        shares = [list(by_task.values())[i::workers] for i in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            scored = [s for part in pool.map(self._score_share, shares) for s in part]
        results = {(s.sample.task_id, s.sample.index): s for s in scored}
        slow = [s.sample for s in scored if _ran_out_of_time(s, self.limits)]
        for again in self._score_share([[sample] for sample in slow]):
            results[again.sample.task_id, again.sample.index] = Score(again.sample, again.parts, measured_alone=True)
        return [results[sample.task_id, sample.index] for sample in samples]

    def _score_share(self, groups: Iterable[list[Sample]]) -> list[Score]:
        return _score_share(self.task_set, groups, self.limits)


@cache
def _say_unsandboxed() -> None:
    """Once per process."""
    print("Generated code runs under EvalPlus's guard, which is no sandbox: use a machine that may be lost.", file=sys.stderr)


def score(task_set: TaskSet, samples: Iterable[Sample], limits: Limits, *, parallel: int | None = None) -> list[Score]:
    """`Scorer.score`, once."""
    with Scorer(task_set, limits, parallel=parallel) as scorer:
        return scorer.score(samples)


def _score_share(task_set: TaskSet, groups: Iterable[list[Sample]], limits: Limits) -> list[Score]:
    scores = []
    with Worker("dylo_moe.scoring_worker") as worker:
        for group in groups:
            seconds = 0.0
            for sample in group:
                seconds = seconds or _prepare(worker, task_set, sample.task_id)
                parts = _check(worker, sample, limits, seconds)
                scores.append(Score(sample, parts or _lost(limits)))
                seconds = seconds if parts else 0.0
    return scores


def _prepare(worker: Worker, task_set: TaskSet, task_id: str) -> float:
    """Makes the worker ready for a task; returns the seconds within which it answers for one sample."""
    try:
        answer = worker.ask({"dataset": task_set.dataset, "task": task_set.tasks[task_id]}, TRUTH_SECONDS)
    except WorkerGone as gone:
        raise ScoringError(f"{task_set.path}: {task_id}: its canonical solution cannot be run: {gone}") from None
    return RUN_SECONDS * answer["runs"]


def _check(worker: Worker, sample: Sample, limits: Limits, seconds: float) -> dict[str, dict[str, Any]] | None:
    """The statuses of one sample; None if the worker did not survive it."""
    question = {"solution": sample.solution, "parts": limits.parts, "options": limits.for_evalplus()}
    try:
        return worker.ask(question, seconds)
    except WorkerGone:
        return None


def _lost(limits: Limits) -> dict[str, dict[str, Any]]:
    """Code that kills or outlasts the process that checks it has failed, here as there."""
    lost = {"stock": FAIL, "ours": FAIL, "reason": "", "seconds": 0.0, "failed": []}
    return dict.fromkeys(limits.parts, lost)


def _ran_out_of_time(score: Score, limits: Limits) -> bool:
    return any(
        PASS not in (part["stock"], part["ours"]) and part["seconds"] >= limits.min_time_limit for part in score.parts.values()
    )
