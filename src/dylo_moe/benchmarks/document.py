"""What `benchmark.json` says of one benchmark, from the results of its runs. `document.schema.json` describes every field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

from dylo_moe.scoring import PASS
from dylo_moe.statistics import CONFIDENCE, compare, fewest_tasks, holm, mean_interval, pass_at_k

SCHEMA = 1
KS = (1, 2, 5, 10, 20, 50, 100)
BETTER, WORSE, SAME, UNDECIDABLE = "better", "worse", "not significant", "too few tasks"


def benchmark_entry(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Runs over the same tasks and their comparisons.

    Args:
        results: a run's name -> what `results.summarise` returns.
    """
    return {
        "tasks": list(next(iter(results.values()))["eval"]),
        "parts": _parts(next(iter(results.values()))),
        "runs": {name: run_entry(result) for name, result in results.items()},
        "comparisons": comparisons(results),
    }


def run_entry(result: Mapping[str, Any]) -> dict[str, Any]:
    """One run: pass@k with intervals, EvalPlus's own value, where the two differ, and what came of each task."""
    return {
        "samples": result["samples"],
        "samples_hash": result["binding"]["samples_hash"],
        "pass_at_k": {part: _estimates(result, part) for part in _parts(result)},
        "stock": result["stock"],
        "differences": result["differences"],
        "measured_alone": result["measured_alone"],
        "sandbox": result["sandbox"],
        "per_task": {task: _task_entry(rows) for task, rows in result["eval"].items()},
    }


def comparisons(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every two runs, in the order of `results`, by all tests that ran; p also raised for their number (Holm)."""
    part = _parts(next(iter(results.values())))[-1]
    tasks = list(next(iter(results.values()))["eval"])
    rates = {name: _rates(result, part) for name, result in results.items()}
    pairs = list(combinations(results, 2))
    found = [compare(rates[first], rates[second], tests=len(pairs)) for first, second in pairs]
    decidable = len(tasks) >= fewest_tasks(max(1, len(pairs)))
    entries = []
    for (first, second), paired, raised in zip(pairs, found, holm([one.p for one in found]), strict=True):
        single = all(results[name]["samples"] == len(tasks) for name in (first, second))
        entries.append(
            {
                "first": first,
                "second": second,
                "difference": asdict(paired.difference),
                "won": [tasks[place] for place in paired.won],
                "lost": [tasks[place] for place in paired.lost],
                "tied": len(tasks) - len(paired.won) - len(paired.lost),
                "test": "McNemar, exact" if single else "sign flips",
                "p": paired.p,
                "p_holm": raised,
                "detectable": paired.detectable,
                "verdict": _verdict(decidable, raised, paired.difference.value),
            }
        )
    return entries


def _verdict(decidable: bool, p: float, difference: float) -> str:
    """Of the second run against the first."""
    if not decidable:
        return UNDECIDABLE
    if p >= 1 - CONFIDENCE:
        return SAME
    return BETTER if difference > 0 else WORSE


def _parts(result: Mapping[str, Any]) -> list[str]:
    """The tests that ran; each part includes those before it."""
    return ["base"] if result["plus"] is None else ["base", "plus"]


def _estimates(result: Mapping[str, Any], part: str) -> dict[str, dict[str, float]]:
    samples, correct = _counts(result, part)
    ks = [k for k in KS if k <= min(samples)]
    return {f"pass@{k}": asdict(mean_interval(pass_at_k(samples, correct, k))) for k in ks}


def _rates(result: Mapping[str, Any], part: str) -> list[float]:
    samples, correct = _counts(result, part)
    return [c / n for n, c in zip(samples, correct, strict=True)]


def _counts(result: Mapping[str, Any], part: str) -> tuple[list[int], list[int]]:
    entries = [_task_entry(rows) for rows in result["eval"].values()]
    return [entry["samples"] for entry in entries], [entry[part] for entry in entries]


def _task_entry(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """How many samples pass, by our statuses and by EvalPlus's."""
    counts: dict[str, Any] = {"samples": len(rows)}
    for prefix in ("", "stock_"):
        base = [row[f"{prefix}base_status"] == PASS for row in rows]
        plus = [row[f"{prefix}plus_status"] for row in rows]
        counts[f"{prefix}base"] = sum(base)
        counts[f"{prefix}plus"] = None if None in plus else sum(b and p == PASS for b, p in zip(base, plus, strict=True))
    return counts
