"""Real tasks, chosen for their oracles and outputs: canonical solutions pass and broken ones fail, here as in EvalPlus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dylo_moe import scoring
from dylo_moe.sandbox.ladder import candidates
from dylo_moe.scoring import Limits, Sample, Scorer
from dylo_moe.tasks import load_tasks

DATA = Path(os.environ.get("DYLO_MOE_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
FILES = {"humaneval": "HumanEvalPlus.jsonl.gz", "mbpp": "MbppPlus.jsonl.gz"}
# Floats with and without a tolerance, roots, large integers, None, dicts, tuples; then MBPP's sets, outputs that only have to be
# there, a Counter, complex numbers, and the two formulas that EvalPlus accepts besides its own.
TASKS = {
    "humaneval": (0, 2, 4, 8, 12, 20, 32, 47, 49, 107, 111, 136),
    "mbpp": (2, 7, 88, 111, 124, 140, 232, 249, 252, 558, 579, 581, 722, 769, 794),
}
STOCK_FAILS = {"HumanEval/32"}
_BROKEN = """

def _broken(function):
    def call(*arguments):
        output = function(*arguments)
        return None if output else [output]
    return call

{entry} = _broken({entry})
"""


def task_set(monkeypatch, dataset):
    file = DATA / FILES[dataset]
    if not file.is_file():
        pytest.skip(f"no {file}: put EvalPlus's release there, or name its directory in DYLO_MOE_SHARED_DATA")
    monkeypatch.setenv(f"{dataset.upper()}_OVERRIDE_PATH", str(file))
    tasks = load_tasks(dataset)
    names = {task.split("/")[1]: task for task in tasks.tasks}
    return tasks, [names[str(number)] for number in TASKS[dataset] if str(number) in names]


@pytest.mark.parametrize("dataset", TASKS)
def test_canonical_solutions_pass_and_broken_ones_fail_as_in_evalplus(monkeypatch, dataset):
    tasks, chosen = task_set(monkeypatch, dataset)
    assert len(chosen) > 10
    right, wrong = [], []
    for name in chosen:
        record = tasks.tasks[name]
        program, entry = record["prompt"] + record["canonical_solution"], record["entry_point"]
        right.append(Sample(name, 0, program))
        wrong.append(Sample(name, 1, program + _BROKEN.format(entry=entry)))
    with Scorer(tasks, Limits(), parallel=2) as scorer:
        scores = scorer.score([*right, *wrong])
    statuses = {(s.sample.task_id, s.sample.index): {p: (d["ours"], d["stock"]) for p, d in s.parts.items()} for s in scores}
    for name in chosen:
        stock = "fail" if name in STOCK_FAILS else "pass"
        assert statuses[name, 0] == dict.fromkeys(("base", "plus"), ("pass", stock)), name
        for ours, stock in statuses[name, 1].values():
            assert (ours == "pass") == (stock == "pass"), name
    assert sum(ours != "pass" for (_, index), parts in statuses.items() if index for ours, _ in parts.values()) > len(chosen)


def test_every_level_of_the_sandbox_passes_canonical_solutions(monkeypatch):
    tasks, chosen = task_set(monkeypatch, "humaneval")
    found = []
    for level in candidates():
        monkeypatch.setattr(scoring, "choose", lambda _, level=level: level)
        with Scorer(tasks, Limits(base_only=True)) as scorer:
            scorer.calibrate(chosen[::3])
            found.append(scorer.sandbox)
    if not found:
        pytest.skip("this machine has neither bubblewrap nor Landlock")
    assert found == [level.name for level in candidates()]
