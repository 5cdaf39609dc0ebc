"""What was measured, in pytest-benchmark's JSON: `pytest-benchmark compare` reads it.

`stats` are seconds of ours, pair by pair; the ratios, limits and goals are in `extra_info`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from harness.machine import describe_commit, describe_machine, versions
from harness.measure import PairedRatio
from harness.performance.cells import Result

FILE = "performance.json"
FORMAT_VERSION = "5.0.0"  # of pytest-benchmark, whose fields these are


def path_in(directory: Path) -> Path:
    return directory / FILE


def read(directory: Path) -> dict:
    return json.loads(path_in(directory).read_text(encoding="utf-8"))


def keep(
    directory: Path,
    results: Sequence[Result],
    *,
    clocks: tuple[PairedRatio, PairedRatio],
    threads: int,
    quick: bool,
    device: str = "cpu",
) -> None:
    """Adds results to those of the same machine and versions; a cell that was measured again replaces its old self."""
    machine = {**describe_machine(device), **versions()}
    old = read(directory) if path_in(directory).is_file() else {}
    kept = old.get("benchmarks", []) if old.get("machine_info") == machine else []
    commit = describe_commit(Path(__file__).resolve().parent)
    facts = {
        "clock": [clock.ratio for clock in clocks],
        "threads": threads,
        "quick": quick,
        "timer": "process_time" if device == "cpu" else "cuda_events",
        "load": round(os.getloadavg()[0], 2),
        "commit": commit["id"],
    }
    new = [_benchmark(result, facts) for result in results]
    names = {entry["fullname"] for entry in new}
    document = {
        "machine_info": machine,
        "commit_info": commit,
        "benchmarks": [entry for entry in kept if entry["fullname"] not in names] + new,
        "datetime": datetime.now(UTC).isoformat(),
        "version": FORMAT_VERSION,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path_in(directory).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _benchmark(result: Result, facts: dict) -> dict:
    cell = result.cell
    return {
        "group": cell.group,
        "name": cell.name,
        "fullname": f"{cell.group}: {cell.name}",
        "params": None,
        "param": None,
        "extra_info": {
            "ratio": result.ratio,
            "low": result.low,
            "high": result.high,
            "goal": cell.goal,
            "at_least": cell.at_least,
            "limit": cell.limit,
            "reached": result.reached,
            "sure": result.sure,
            "ratios": [ours / other for ours, other in result.times],
            "tags": cell.tags,
            "note": cell.note,
            **facts,
        },
        "options": {"timer": facts["timer"], "min_rounds": len(result.times)},
        "stats": _stats([ours for ours, _ in result.times]),
    }


def _stats(seconds: list[float]) -> dict:
    """The fields of pytest_benchmark.stats.Stats; of a ratio of counts, which took no time, zeros."""
    data = np.asarray(seconds or [0.0])
    low, median, high = np.quantile(data, [0.25, 0.5, 0.75])
    mean, spread = float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else 0.0
    fence = 1.5 * (high - low)
    far = int(((data < low - fence) | (data > high + fence)).sum())
    beyond = int((np.abs(data - mean) > spread).sum())
    return {
        "min": float(data.min()),
        "max": float(data.max()),
        "mean": mean,
        "stddev": spread,
        "rounds": len(data),
        "median": float(median),
        "iqr": float(high - low),
        "q1": float(low),
        "q3": float(high),
        "iqr_outliers": far,
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{far}",
        "ld15iqr": float(data[data >= low - fence].min()),
        "hd15iqr": float(data[data <= high + fence].max()),
        "ops": 1 / mean if mean else 0.0,
        "total": float(data.sum()),
        "data": [float(value) for value in data],
        "iterations": 1,
    }
