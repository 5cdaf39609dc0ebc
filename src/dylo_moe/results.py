"""Scores -> pass@k, EvalPlus's and ours side by side, in one file that cannot be taken for another run's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dylo_moe.errors import SampleFileError, TaskSetError
from dylo_moe.identity import versions
from dylo_moe.scoring import PASS, Limits, Sample, Score
from dylo_moe.tasks import TaskSet

SCHEMA = 2
KS = (1, 10, 100)
_NAMED = 8


def read_samples(path: Path, task_set: TaskSet, wanted: list[str]) -> list[Sample]:
    """The samples of the wanted tasks, from EvalPlus's JSON lines or from its directory of TASK_0/0.py files.

    Raises:
        SampleFileError: the file cannot be read. TaskSetError: a wanted task has no sample; the message names such tasks.
    """
    pairs = list(_read_directory(path) if path.is_dir() else _read_jsonl(path, task_set))
    counts: Counter[str] = Counter()
    samples, keep = [], set(wanted)
    for task_id, solution in pairs:
        if task_id in keep:
            samples.append(Sample(task_id, counts[task_id], solution))
            counts[task_id] += 1
    missing = [task for task in wanted if task not in counts]
    if missing:
        names = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise TaskSetError(f"{path}: no samples for {len(missing)} of {len(wanted)} tasks: {names}; use id_range for a part")
    return samples


def _read_jsonl(path: Path, task_set: TaskSet) -> Iterable[tuple[str, str]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SampleFileError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            task_id = sample["task_id"]
            prompt = task_set.tasks[task_id]["prompt"] if task_id in task_set.tasks else ""
            solution = sample["solution"] if "solution" in sample else prompt + sample["completion"]
        except (ValueError, KeyError, TypeError) as error:
            raise SampleFileError(f"{path}:{number}: not a sample: {type(error).__name__} {error}") from None
        if not isinstance(solution, str):
            raise SampleFileError(f"{path}:{number}: solution is not a text")
        yield task_id, solution


def _read_directory(path: Path) -> Iterable[tuple[str, str]]:
    for directory in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        files = [file for file in directory.glob("*.py") if file.stem.isdigit()]
        for file in sorted(files, key=lambda file: int(file.stem)):
            yield directory.name.replace("_", "/"), file.read_text(encoding="utf-8")


def result_path(samples: Path) -> Path:
    """EvalPlus's name for the results of a sample file or directory."""
    if samples.is_dir():
        return samples / "eval_results.json"
    return samples.with_name(samples.name.removesuffix(".jsonl") + "_eval_results.json")


def binding(task_set: TaskSet, samples: list[Sample], limits: Limits, *, sandbox: str = "auto") -> dict[str, Any]:
    """What the results depend on; stored results are used again only if they agree with all of it.

    sandbox: the one asked for. Results from without a sandbox are not used where one is wanted.
    """
    content = json.dumps([[s.task_id, s.solution] for s in samples])
    return {
        "schema": SCHEMA,
        "dataset": task_set.dataset,
        "dataset_hash": task_set.hash,
        "samples_hash": hashlib.sha256(content.encode()).hexdigest(),
        "limits": asdict(limits),
        "sandboxed": sandbox != "none",
        "versions": {name: versions()[name] for name in ("dylo-moe", "evalplus")},
    }


def stored(path: Path, bound: dict[str, Any]) -> dict[str, Any] | None:
    """Results that an earlier run left for exactly these samples, tasks and limits."""
    try:
        results = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) and results.get("binding") == bound else None


def summarise(
    task_set: TaskSet, scores: list[Score], limits: Limits, bound: dict[str, Any], *, sandbox: str | None = None
) -> dict[str, Any]:
    """The whole result, ready for JSON.

    Args:
        bound: of `binding`.
        sandbox: the level that generated code ran in, `Scorer.sandbox`.

    Returns:
        "pass@k": by all tests that ran; "base" and "plus" (None with base_only): pass@k by part, as EvalPlus reports them;
        "stock": the same with EvalPlus's own statuses; "differences": samples that only one of us passes, and why;
        "sandbox": the level that generated code ran in;
        "eval": per task and sample, with EvalPlus's keys; "hash": EvalPlus's hash of the task file.
    """
    by_task: dict[str, list[Score]] = defaultdict(list)
    for item in scores:
        by_task[item.sample.task_id].append(item)
    ours, stock = (_pass_at_k(by_task, which, limits) for which in ("ours", "stock"))
    return {
        **(ours["plus"] or ours["base"]),
        **ours,
        "stock": stock,
        "differences": [found for item in scores for found in _differences(item)],
        "tasks": len(by_task),
        "samples": len(scores),
        "sandbox": sandbox,
        "measured_alone": sum(item.measured_alone for item in scores),
        "binding": bound,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "hash": task_set.stock_hash,
        "eval": {task: [_row(item) for item in items] for task, items in by_task.items()},
    }


def _pass_at_k(by_task: dict[str, list[Score]], which: str, limits: Limits) -> dict[str, dict[str, float] | None]:
    from evalplus.eval import estimate_pass_at_k

    totals = [len(items) for items in by_task.values()]
    results: dict[str, dict[str, float] | None] = {"base": None, "plus": None}
    for part in limits.parts:
        tests = limits.parts[: limits.parts.index(part) + 1]
        correct = [sum(item.passed(which, tests) for item in items) for items in by_task.values()]
        ks = [k for k in KS if min(totals) >= k]
        results[part] = {f"pass@{k}": float(estimate_pass_at_k(totals, correct, k).mean()) for k in ks}
    return results


def _differences(item: Score) -> Iterable[dict[str, Any]]:
    for part, found in item.parts.items():
        if (found["stock"] == PASS) != (found["ours"] == PASS):
            where = {"task_id": item.sample.task_id, "sample": item.sample.index, "tests": part}
            yield {**where, **{name: found[name] for name in ("stock", "ours", "reason")}}


def _row(item: Score) -> dict[str, Any]:
    nothing = {"ours": None, "stock": None, "failed": []}
    base, plus = (item.parts.get(part, nothing) for part in ("base", "plus"))
    return {
        "task_id": item.sample.task_id,
        "solution": item.sample.solution,
        "base_status": base["ours"],
        "plus_status": plus["ours"],
        "stock_base_status": base["stock"],
        "stock_plus_status": plus["stock"],
        "base_fail_tests": base["failed"],
        "plus_fail_tests": plus["failed"],
    }
