"""One scored run of a planted checkpoint through the public API: generate samples, score them, say which tasks pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from dylo_moe.evalplus import evaluate, run_codegen
from harness.specimens.competence import Planted

MAX_NEW_TOKENS = 128  # the longest planted answer has under 90; a wrong model may never write an end


@dataclass(frozen=True)
class Run:
    """What came of one strategy. passed: task id -> for each sample whether base and plus tests pass."""

    result: dict
    passed: dict[str, list[bool]]
    raw: dict[str, list[str]]


def scored_run(planted: Planted, strategy: str, root: Path, *, n_samples: int = 1) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"{planted.dataset.upper()}_OVERRIDE_PATH", str(planted.task_file))
        samples = run_codegen(
            str(planted.checkpoint),
            planted.dataset,
            root=str(root),
            n_samples=n_samples,
            greedy=True,
            backend="peft_moe",
            dtype="float32",
            routing_strategy=strategy,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        result = evaluate(planted.dataset, samples=samples, parallel=2)
    passed = {task: [_passed(row) for row in rows] for task, rows in result["eval"].items()}
    return Run(result, passed, _raw_solutions(Path(samples)))


def _passed(row: dict) -> bool:
    return row["base_status"] == row["plus_status"] == "pass"


def _raw_solutions(samples: Path) -> dict[str, list[str]]:
    raw: dict[str, list[str]] = {}
    lines = samples.with_name(samples.name.removesuffix(".jsonl") + ".raw.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        raw.setdefault(line["task_id"], []).append(line["solution"])
    return raw


def assert_scored_as_known(planted: Planted, runs: dict[str, Run]) -> None:
    """Every strategy's pass or fail, task by task; pass@1, ours and EvalPlus's own; and every character of every answer."""
    for strategy, run in runs.items():
        known = planted.known_matrix[strategy]
        assert run.passed == {task: [passes] for task, passes in known.items()}, strategy
        assert run.result["pass@1"] == pytest.approx(planted.pass_at_1(strategy)), strategy
        assert run.result["stock"]["plus"]["pass@1"] == pytest.approx(planted.pass_at_1(strategy)), strategy
        prompts = {task: record["prompt"].strip() + "\n" for task, record in planted.records.items()}
        assert run.raw == {task: [prompts[task] + text] for task, text in planted.expected[strategy].items()}, strategy


def assert_diagonal_and_union(planted: Planted, runs: dict[str, Run]) -> None:
    """Written without the known matrix: each expert passes its own group and nothing else, the router all of them."""
    passing = {strategy: {task for task, (passes,) in run.passed.items() if passes} for strategy, run in runs.items()}
    singles = [passing[f"single:{expert}"] for expert in range(len(planted.groups))]
    assert singles == [set(group) for group in planted.groups]
    assert passing["router"] == set().union(*singles) == set(planted.records)
