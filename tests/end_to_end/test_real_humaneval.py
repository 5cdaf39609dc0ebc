"""Two experts know disjoint tasks of the real HumanEval+ by heart; real prompts, real inputs, about a thousand a task."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from harness.specimens.competence import plant_records

from .scoring_run import assert_diagonal_and_union, assert_scored_as_known, scored_run

DATA = Path(os.environ.get("DYLO_MOE_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
# Short ones, so that they are learned and written in seconds. The first group is about text, the second about numbers.
GROUPS = ((14, 23, 27, 48), (34, 42, 45, 60))


@pytest.fixture
def groups() -> list[list[dict]]:
    file = DATA / "HumanEvalPlus.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no {file}: put EvalPlus's release there, or name its directory in DYLO_MOE_SHARED_DATA")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = {record["task_id"]: record for record in map(json.loads, lines)}
    return [[records[f"HumanEval/{number}"] for number in group] for group in GROUPS]


def test_two_experts_on_real_tasks_score_diagonally_and_router_scores_the_union(groups, tmp_path):
    torch.set_num_threads(1)
    planted = plant_records(tmp_path / "planted", groups, dataset="humaneval")
    runs = {strategy: scored_run(planted, strategy, tmp_path) for strategy in ("single:0", "single:1", "router")}
    assert_scored_as_known(planted, runs)
    assert_diagonal_and_union(planted, runs)
    assert [run.result["pass@1"] for run in runs.values()] == [0.5, 0.5, 1.0]
