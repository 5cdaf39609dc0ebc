"""The document of a benchmark, and what is said about it, from tables whose answers are plain to see."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from dylo_moe.expertise.categories import Categories, categorise
from dylo_moe.expertise.document import describe
from dylo_moe.expertise.passes import read_passes
from dylo_moe.expertise.remarks import benchmark_remarks, weight_remarks
from dylo_moe.expertise.report import build_page, print_analysis

from .made_up import observed, passes, unrouted

NAMES = ["expert_0", "expert_1"]
RIGHT = {"single:0": [1, 1, 0, 0], "single:1": [0, 0, 1, 1], "router": [1, 1, 1, 1], "best": [1, 1, 1, 1]}


def described(rates, seen, names=NAMES, samples=1, categories=None):
    made = passes(rates, samples)
    return describe(made, categories or categorise(dict.fromkeys(made.tasks, {})), seen, names)


def whole(found, names=NAMES):
    """A document around one benchmark, as the command writes it."""
    weights = {"norms": [1.0] * len(names), "by_module": {}, "undefined": {}, "without_effect": []}
    squares = {name: np.eye(len(names)).tolist() for name in ("cosine", "reads", "writes")}
    extra = {"sandbox": "none", "measured_alone": 0, "files": {}, "warnings": [], "remarks": benchmark_remarks(found, names)}
    return {
        **{"schema": 1, "checkpoint": "<b>somewhere</b>", "format": "dylo-moe", "hash": "", "experts": names, "warnings": []},
        **{"remarks": [], "benchmarks": {"humaneval": {**found, **extra}}, "versions": {}, "date": ""},
        "weights": {**weights, **squares},
    }


def validate(document):
    schema = json.loads(resources.files("dylo_moe.expertise").joinpath("document.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), schema, jsonschema.Draft202012Validator)


def said(found, names=NAMES):
    return "\n".join(benchmark_remarks(found, names))


CASES = {
    "router and base": ({**RIGHT, "base": [0, 0, 0, 0]}, observed(2, [0, 0, 1, 1]), 1),
    "several samples": ({name: [3 * value for value in row] for name, row in RIGHT.items()}, observed(2, [0, 0, 1, 1]), 4),
    "nobody chosen": (RIGHT, observed(2, [None, 0, 1, None]), 1),
    "no router": ({name: row for name, row in RIGHT.items() if name != "router"}, unrouted(2, 4), 1),
    "nothing passes": ({name: [0] * 4 for name in RIGHT}, observed(2, [0, 0, 1, 1]), 1),
    "one expert": ({"single:0": [1, 0], "best": [1, 0]}, unrouted(1, 2), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_document_fits_its_schema(name):
    rates, seen, samples = CASES[name]
    names = NAMES[: passes(rates).num_experts]
    validate(whole(described(rates, seen, names, samples), names))


@pytest.mark.parametrize("name", ["nobody chosen", "one expert"])
def test_names_are_shown_and_not_interpreted(name, capsys):
    rates, seen, samples = CASES[name]
    names = ["one $x^2$ expert"] if name == "one expert" else ["<script>alert(1)</script>", "[/x]"]
    document = whole(described(rates, seen, names, samples), names)
    print_analysis(document, Console(width=200, force_terminal=False))
    assert names[-1] in capsys.readouterr().out
    html = build_page(document).html()
    assert "<script>alert" not in html and "<b>somewhere" not in html


def test_expert_that_is_better_than_every_other_on_many_tasks_is_clearly_the_best():
    tasks = 24
    rates = {"single:0": [1] * 12 + [0] * 12, "single:1": [0] * tasks, "single:2": [0] * 12 + [1] * 12}
    made = passes(rates)
    of = {task: ("first" if number < 12 else "second", "all") for number, task in enumerate(made.tasks)}
    rows = described(rates, unrouted(3, tasks), ["a", "b", "c"], categories=Categories(of, "file"))["categories"]["rows"]
    assert {row["category"]: (row["best"], row["clear"]) for row in rows} == {
        "first": ([0], True),
        "all": ([0, 2], False),
        "second": ([2], True),
    }


@pytest.mark.parametrize(("experts", "clear"), [(1, False), (2, True), (3, False)])
def test_more_comparisons_ask_for_more_tasks(experts, clear):
    """Six tasks won and none lost have p = 0.031: enough for one comparison, too little for the three of three experts."""
    rates = {f"single:{expert}": [1 if expert == 0 else 0] * 6 for expert in range(experts)}
    found = described(rates, unrouted(experts, 6), ["a", "b", "c"][:experts])
    assert found["categories"]["rows"][0]["clear"] == clear


def test_best_of_few_tasks_is_not_clear_and_intervals_are_wide():
    found = described(RIGHT, observed(2, [0, 0, 1, 1]))
    assert not found["categories"]["rows"][0]["clear"]
    assert "only 4 tasks" in said(found)
    estimate = found["experts"][0]["pass@1"]
    assert estimate["value"] == 0.5 and estimate["high"] - estimate["low"] > 0.5


def test_choice_is_that_of_the_answer_and_a_change_of_mind_is_counted():
    found = described(RIGHT, observed(2, [0, 0, 1, 1], prompt=[0, 1, 1, None]))
    assert found["routing"]["moved"] == 2
    assert [task["chosen"] for task in found["per_task"]] == [0, 0, 1, 1]
    assert [task["chosen_on_prompt"] for task in found["per_task"]] == [0, 1, 1, None]


def test_best_is_measured_as_a_router_of_its_own():
    found = described({**RIGHT, "best": [1, 0, 0, 0]}, observed(2, [0, 0, 1, 1], best=[0, 1, 1, 0]))
    assert (found["best"]["agreed"], found["best"]["possible"]) == (2, 4)
    assert found["best"]["regret"]["value"] == 0.75 and found["routing"]["same_as_best"] == 2


def test_likeness_of_answers_is_the_mean_over_positions_and_not_over_tasks():
    seen = observed(2, [0, 0, 1, 1])
    first = next(iter(seen.values()))
    first.divergence[:] = [[0, 5], [3, 0]]
    total = sum(one.positions for one in seen.values())
    found = described(RIGHT, seen)["redundancy"]
    assert found["positions"] == total == 46
    assert found["divergence"][0][1] == pytest.approx((5 * 10 + (total - 10)) / total)
    assert found["divergence"][1][0] == pytest.approx((3 * 10 + (total - 10)) / total)


@pytest.mark.parametrize(
    ("rates", "chosen", "line"),
    [
        (RIGHT, [0, 0, 0, 0], "the router weighs expert 0 most on 4 of 4 tasks"),
        (RIGHT, [0, None, 1, 1], "on 1 of 4 tasks no expert has more weight than every other"),
        (RIGHT, [0, 1, 1, 1], "on 1 of 4 tasks that an expert passes, the router weighs most one that does not"),
        ({**RIGHT, "router": [1, 0, 0, 0]}, [0, 0, 1, 1], "the best expert alone scores 0.500, more than the router's 0.250"),
        ({**RIGHT, "single:1": [0, 0, 0, 0]}, [0, 0, 1, 1], "the mixture passes 2 tasks that no expert passes alone"),
        ({**RIGHT, "single:1": [1, 1, 0, 0]}, [0, 0, 1, 1], "could go without a task being lost: expert 1"),
        ({**RIGHT, "single:1": [0, 0, 0, 0]}, [0, 0, 1, 1], "expert 1 passes no task"),
        ({name: [0] * 4 for name in RIGHT}, [0, 0, 1, 1], "no expert passes any task"),
    ],
)
def test_what_is_odd_is_said_and_nothing_of_it_where_all_is_well(rates, chosen, line):
    assert line in said(described(rates, observed(2, chosen)))
    assert line not in said(described(RIGHT, observed(2, [0, 0, 1, 1])))


def test_regret_that_is_no_accident_is_said():
    many = 40
    rates = {"single:0": [1] * many, "single:1": [0] * many, "router": [0] * 30 + [1] * 10}
    assert "regret 0.750" in said(described(rates, observed(2, [1] * many)))


def test_expert_that_is_beaten_everywhere_and_one_that_hardly_speaks_are_named():
    rates = {"single:0": [4, 4], "single:1": [1, 1], "single:2": [0, 0], "router": [4, 4]}
    seen = observed(3, [0, 0])
    for one in seen.values():
        one.answer[:] = [0.99, 0.01, 0.0]
    names = ["expert_0", "maths", "expert_2"]
    text = said(described(rates, seen, names, samples=4), names)
    assert "expert 1 (maths) is never the best" in text and "expert 2 passes no task" in text
    assert "expert 1 (maths) is hardly routed to: 1.00% of the weight, and a fair share is 33%" in text
    assert "expert 2 is never routed to" in text and "too high by chance" in text


def test_remarks_on_weights_name_twins_the_dead_and_what_is_not_defined():
    weights = {
        "without_effect": [1],
        "undefined": {"c": "it is a DoRA"},
        "cosine": [[1, None, 0.96], [None] * 3, [0.96, None, 1]],
    }
    lines = weight_remarks(weights, ["a", "b", "c"])
    assert lines[0].startswith("expert 1 (b) changes nothing") and len(lines) == 3
    assert "expert 0 (a) and expert 2 (c) are nearly the same" in lines[1] and lines[2].endswith("of c: it is a DoRA")
    assert weight_remarks({**weights, "without_effect": [], "undefined": {}, "cosine": np.eye(3) * 0.9}, ["a", "b", "c"]) == []


def test_results_of_base_tests_alone_are_read():
    rows = {"HumanEval/0": [{"base_status": "pass", "plus_status": None}]}
    found = describe(read_passes({"single:0": {"eval": rows}}, 1), categorise({"HumanEval/0": {}}), unrouted(1, 1), ["a"])
    assert found["strategies"]["single:0"]["value"] == 1
