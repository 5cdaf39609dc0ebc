"""Oracle, regret, confusion and dispensable experts on tables whose answers are plain to see."""

import numpy as np
import pytest

from dylo_moe.errors import TaskSetError
from dylo_moe.expertise.answers import jaccard, phi
from dylo_moe.expertise.choices import NOBODY, agreement, confusion, picked_wrong, regret
from dylo_moe.expertise.passes import Passes, dispensable, loss_without, never_best, read_passes, winners

DIAGONAL = [[1, 1, 0, 0], [0, 0, 1, 1]]


def passes(experts, router=None, samples=1) -> Passes:
    rows = {f"single:{e}": np.array(row) for e, row in enumerate(experts)}
    if router is not None:
        rows["router"] = np.array(router)
    tasks = [f"HumanEval/{i}" for i in range(len(experts[0]))]
    return Passes(tasks, rows, {name: np.full(len(tasks), samples) for name in rows}, len(experts))


def result(statuses: dict[str, list[tuple]]) -> dict:
    rows = {task: [{"base_status": b, "plus_status": p} for b, p in samples] for task, samples in statuses.items()}
    return {"eval": rows}


def test_sample_passes_by_all_tests_that_ran():
    statuses = {
        "a/0": [("pass", "pass"), ("pass", "fail")],
        "a/1": [("pass", None), ("timeout", None)],
        "a/2": [(None, None)] * 2,
    }
    found = read_passes({"single:0": result(statuses)}, 1)
    assert found.tasks == ["a/0", "a/1", "a/2"]
    assert found.rates("single:0").tolist() == [0.5, 0.5, 0.0]
    assert found.known.tolist() == [[True, True, False]]


def test_missing_expert_and_other_tasks_are_refused():
    one = result({"a/0": [("pass", "pass")]})
    with pytest.raises(TaskSetError, match="no results for single:1"):
        read_passes({"single:0": one}, 2)
    with pytest.raises(TaskSetError, match="router and single:0 differ in the tasks: a/1"):
        read_passes({"single:0": one, "router": result({"a/0": [("pass", "pass")], "a/1": [("pass", "pass")]})}, 1)


def test_router_that_knows_has_no_regret():
    found = regret(passes(DIAGONAL, router=[1, 1, 1, 1]), np.array([0, 0, 1, 1]))
    assert (found.oracle, found.router, found.chosen, found.regret) == (1.0, 1.0, 1.0, 0.0)
    assert (found.best_single, found.random) == (0.5, 0.5)


def test_regret_is_what_choice_and_mixing_lose():
    found = regret(passes(DIAGONAL, router=[1, 0, 0, 0]), np.array([0, 0, 0, NOBODY]))
    assert (found.oracle, found.router, found.chosen) == (1.0, 0.25, 0.5)
    assert found.regret == found.by_choice + found.by_mixing == 0.75
    assert found.per_task.tolist() == [0, 1, 1, 1]


def test_mixture_that_passes_what_no_expert_does_has_negative_regret():
    found = regret(passes([[0, 0], [0, 1]], router=[1, 1]), np.array([0, 1]))
    assert found.regret == -0.5 and found.by_choice == 0


def test_confusion_counts_every_expert_that_passes():
    known = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=bool)
    found = confusion(known, np.array([0, 1, 0, NOBODY]))
    assert found.tolist() == [[1, 1, 0, 2], [1, 1, 0, 1], [0, 0, 1, 1]]
    assert picked_wrong(known, np.array([0, 1, 0, NOBODY])).tolist() == [2]
    assert agreement(known, np.array([0, 1, 0, NOBODY])) == (2, 3)


def test_weight_for_nobody_is_a_wrong_pick_where_somebody_passes():
    assert picked_wrong(np.array(DIAGONAL, dtype=bool), np.array([0, NOBODY, 1, 0])).tolist() == [1, 3]


def test_winners_are_all_that_share_the_first_place_and_none_at_zero():
    made = passes([[2, 1, 0], [2, 3, 0]], samples=4)
    assert winners(made) == [[0, 1], [1], []]
    assert never_best(made) == []
    assert never_best(passes([[1, 1], [0, 1], [0, 0]])) == [2]


def test_twins_can_go_alone_but_not_together():
    alone, together = dispensable(passes([[1, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert (alone, together) == ([0, 1], [1])


def test_only_one_to_pass_a_task_never_goes():
    made = passes([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    assert dispensable(made) == ([2], [2])
    assert loss_without(made.experts, [1]) == 0.25 and loss_without(made.experts, [0, 2]) == 0.75


def test_weaker_one_goes_first_and_one_always_stays():
    assert dispensable(passes([[0, 0], [0, 0], [0, 0]])) == ([0, 1, 2], [1, 2])
    assert dispensable(passes([[0, 0]])) == ([], [])
    assert dispensable(passes([[1, 1, 1], [0, 1, 1], [1, 1, 1]])) == ([0, 1, 2], [1, 2])
    assert dispensable(passes([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])) == ([0, 1, 2], [1, 2])


@pytest.mark.parametrize("seed", range(20))
def test_set_that_goes_loses_nothing_and_cannot_be_larger(seed):
    rates = np.random.default_rng(seed).integers(0, 2, (4, 5))
    alone, together = dispensable(passes(rates))
    assert loss_without(rates, together) == 0
    assert set(together) <= set(alone)
    assert all(loss_without(rates, [*together, e]) > 0 for e in range(4) if e not in together and len(together) < 3)


def test_jaccard_counts_common_tasks():
    known = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    np.testing.assert_allclose(jaccard(known), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, np.nan]])


@pytest.mark.parametrize("seed", range(5))
def test_phi_is_the_correlation_of_passing(seed):
    known = np.random.default_rng(seed).random((3, 30)) < 0.5
    np.testing.assert_allclose(phi(known), np.corrcoef(known.astype(float)), atol=1e-12)
    assert np.isnan(phi(np.array([[1, 1], [1, 0]], dtype=bool))[0]).all()
