"""The judge judges itself first, in the same run and on the same machine: what fails here would make every verdict worthless."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from harness import compare, outcome
from harness.bench import Bench
from harness.compare import Mismatch, assert_within
from harness.measure import PairedTimer
from harness.outcome import Inconclusive
from harness.specimens.scoring import score
from harness.specimens.tasks import TASKS

CLOCK_PAIRS = (11, 33)
CLOCK_SIZE = 448
CANONICAL_TASKS = 4

Step = tuple[str, str, Callable[[], dict]]


def calibrate(
    checkpoint: Path, base_model: str | None, checks: Sequence[str], assume: Mapping[str, object] | None = None
) -> list[dict]:
    """Runs what the chosen checks rely on; results in the form of a check's.

    checkpoint: any that will be judged. A failure of the clock leaves times undecided; any other is the judge's own.
    """
    bench = Bench(checkpoint, subject=None, base_model=base_model, assume=assume or {})
    steps: list[Step] = [
        ("calibration.comparison", "A wrong element, a NaN and a comparison that cannot fail are each refused.", _comparison),
        (
            "calibration.reference",
            "The reference, built twice, gives the same numbers bit for bit.",
            lambda: _reference(bench),
        ),
    ]
    if any(check.startswith("speed.") and "time" in check or "faster" in check for check in checks):
        steps.append(("calibration.clock", "The clock finds no difference between a piece of work and itself.", _clock))
    if any(check.startswith(("evaluation.", "decoder.")) for check in checks):
        steps.append(("calibration.scorer", "Canonical solutions all pass and wrong ones all fail.", _scorer))
    return [_result(*step) for step in steps]


def _result(name: str, statement: str, step: Callable[[], dict]) -> dict:
    start, error, evidence = time.perf_counter(), None, {}
    try:
        evidence = step()
    except Exception as raised:  # noqa: BLE001  (a judge that cannot calibrate says why, whatever the reason)
        error = raised
    return {
        "id": name,
        "outcome": outcome.outcome_of(error),
        "statement": statement,
        "seconds": round(time.perf_counter() - start, 4),
        "message": "" if error is None else f"{type(error).__name__}: {error}",
        "evidence": evidence,
    }


def _comparison() -> dict:
    """Plants a fault in each kind of comparison."""
    want = np.linspace(1.0, 2.0, 7)
    faults = {"wrong": want + np.eye(7)[3] * 1e-3, "nan": np.where(np.arange(7) == 2, np.nan, want), "shape": want[:6]}
    for name, got in faults.items():
        try:
            assert_within(got, want, 1e-6)
        except Mismatch:
            continue
        raise AssertionError(f"the comparison let a planted fault pass: {name}")
    try:
        assert_within(want, want, 1.0, effect=1.0)
    except outcome.Void:
        return {"faults_refused": len(faults) + 1}
    raise AssertionError("a comparison that could not have failed was not void")


def _reference(bench: Bench) -> dict:
    """Two references from the same files, every logit and routing weight."""
    ids, mask = _prompt(bench)
    again = Bench(bench.checkpoint, subject=None, base_model=bench.base_model, assume=bench.assume)
    first, second = bench.reference, again.reference
    with compare.recording() as comparisons:
        if first.num_experts:
            weights = torch.full((*ids.shape, first.num_experts), 1 / first.num_experts)
            assert_within(second.logits(ids, mask, weights=weights), first.logits(ids, mask, weights=weights), 0.0, what="logits")
        if first.router is not None:
            assert_within(second.routing_weights(ids, mask), first.routing_weights(ids, mask), 0.0, what="routing weights")
    return compare.summary(comparisons)


def _prompt(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    config = bench.reference.model.config
    ids = torch.as_tensor(bench.rng(3).integers(0, config.vocab_size, size=(1, 9)))
    return ids, torch.ones_like(ids)


def _clock() -> dict:
    """Pairs of one product: the interval of the ratio must come within five per cent of 1, far inside every limit on time."""
    matrix = torch.randn(CLOCK_SIZE, CLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    timer = PairedTimer(lambda: matrix @ matrix, lambda: matrix @ matrix)
    for pairs in CLOCK_PAIRS:
        found = timer.more(pairs)
        if found.low <= 1.05 and found.high >= 0.95:
            return {"ratios": {"same/same time": {**found.evidence(), "kind": "time"}}}
    raise Inconclusive(f"a product took {found.low:.3g} to {found.high:.3g} times itself (95 % bounds): times mean nothing here")


def _scorer() -> dict:
    """A few tasks with EvalPlus's own checker: right answers, then wrong ones."""
    records = [task.record("humaneval") for task in TASKS[:CANONICAL_TASKS]]
    right = {record["task_id"]: record["prompt"] + record["canonical_solution"] for record in records}
    wrong = {record["task_id"]: record["prompt"] + "    return None\n" for record in records}
    failed = [task for task, passed in score("humaneval", records, right).items() if not passed]
    passed = [task for task, passed in score("humaneval", records, wrong).items() if passed]
    if failed or passed:
        raise AssertionError(f"canonical solutions that failed: {failed}; wrong solutions that passed: {passed}")
    return {"canonical_solutions": len(right), "wrong_solutions": len(wrong)}
