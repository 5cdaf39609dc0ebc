"""A benchmark's document and its reports, from made-up results: every number can be counted by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

import dylo_moe.benchmarks
from dylo_moe.benchmarks.document import benchmark_entry
from dylo_moe.benchmarks.report import build_page, print_benchmarks
from dylo_moe.benchmarks.running import REPORTS, write_reports
from dylo_moe.errors import OutputError

SCHEMA = json.loads((Path(dylo_moe.benchmarks.__file__).parent / "document.schema.json").read_text())


def row(passes: bool, plus: bool | None = True, stock: bool | None = None) -> dict:
    """One sample: whether its base tests pass, its plus tests (None: not run), and what EvalPlus says of its base tests."""
    words = {True: "pass", False: "fail", None: None}
    stock = passes if stock is None else stock
    return {
        "base_status": words[passes],
        "plus_status": words[plus],
        "stock_base_status": words[stock],
        "stock_plus_status": words[plus],
    }


def result(*tasks: list[dict], differences: tuple = ()) -> dict:
    """What `results.summarise` returns, as far as the document reads it."""
    ran_plus = tasks[0][0]["plus_status"] is not None
    return {
        "eval": {f"HumanEval/{number}": rows for number, rows in enumerate(tasks)},
        "plus": {} if ran_plus else None,
        "samples": sum(len(rows) for rows in tasks),
        "stock": {"base": {"pass@1": 0.25}, "plus": {"pass@1": 0.125} if ran_plus else None},
        "differences": list(differences),
        "measured_alone": 0,
        "sandbox": "bwrap",
        "binding": {"samples_hash": "0" * 64},
    }


def singles(text: str) -> dict:
    """One sample per task: "+" passes all, "b" the base tests only, "-" nothing."""
    return result(*([row(letter != "-", letter == "+")] for letter in text))


def document(**runs: dict) -> dict:
    entry = benchmark_entry(runs)
    for run in entry["runs"].values():
        run["samples_file"] = "humaneval/x.jsonl"
    generation = {"new_samples": 8, "seconds": 4.0, "samples_per_second": 2.0, "scoring_seconds": 1.0}
    about = {"task_file": "tasks.jsonl", "task_file_hash": "0" * 64, "generation": generation}
    return {
        "schema": 1,
        "date": "2026-01-01 00:00 UTC",
        "command": {"checkpoint": "<b>&my model", "greedy": True, "n_samples": 1, "temperature": 0.0},
        "versions": {"torch": "2"},
        "identity": {"checkpoint": "0" * 64, "base": None},
        "sandbox": sorted({run["sandbox"] for run in entry["runs"].values()}),
        "benchmarks": {"humaneval": {**about, **entry}},
    }


def printed(found: dict) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))
    print_benchmarks(found, console)
    return console.export_text()


def test_scores_are_counted_per_part_of_the_tests():
    entry = benchmark_entry({"router": singles("++b-----")})
    found = entry["runs"]["router"]["pass_at_k"]
    assert (found["base"]["pass@1"]["value"], found["plus"]["pass@1"]["value"]) == (0.375, 0.25)
    assert list(found["base"]) == ["pass@1"]
    assert entry["runs"]["router"]["per_task"]["HumanEval/2"] == {
        "samples": 1,
        "base": 1,
        "plus": 0,
        "stock_base": 1,
        "stock_plus": 0,
    }
    assert entry["comparisons"] == []


def test_several_samples_give_several_k_and_rates():
    """Five samples of two tasks: 1 and 5 right; pass@2 of the first is 1 - C(4,2)/C(5,2) = 0.4."""
    run = result([row(True)] + [row(False, False)] * 4, [row(True)] * 5)
    found = benchmark_entry({"x": run})["runs"]["x"]["pass_at_k"]["plus"]
    assert {k: estimate["value"] for k, estimate in found.items()} == pytest.approx({"pass@1": 0.6, "pass@2": 0.7, "pass@5": 1.0})


def test_k_is_at_most_the_samples_of_every_task():
    run = result([row(True)] * 2, [row(True)])
    assert list(benchmark_entry({"x": run})["runs"]["x"]["pass_at_k"]["plus"]) == ["pass@1"]


def test_pairs_are_won_and_lost_by_all_tests_that_ran():
    entry = benchmark_entry({"base": singles("+---b---"), "router": singles("b+++++++")})
    (found,) = entry["comparisons"]
    assert (found["first"], found["second"], found["tied"]) == ("base", "router", 0)
    assert found["lost"] == ["HumanEval/0"]
    assert found["won"] == [f"HumanEval/{number}" for number in range(1, 8)]
    assert found["difference"]["value"] == pytest.approx(6 / 8)
    assert found["test"] == "McNemar, exact" and found["p"] == pytest.approx(2 * 9 / 256)
    assert found["verdict"] == "not significant"


def test_base_tests_decide_where_only_they_ran():
    runs = {name: result(*([row(letter == "+", None)] for letter in text)) for name, text in (("a", "--"), ("b", "+-"))}
    entry = benchmark_entry(runs)
    assert entry["parts"] == ["base"] and entry["comparisons"][0]["won"] == ["HumanEval/0"]
    assert entry["runs"]["b"]["per_task"]["HumanEval/0"]["plus"] is None


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("-" * 9, "+" * 9, "better"),
        ("+" * 9, "-" * 9, "worse"),
        ("+" * 9, "+" * 9, "not significant"),
        ("-" * 5, "+" * 5, "too few tasks"),
    ],
)
def test_verdict_says_who_is_better_or_that_nobody_can_say(first, second, verdict):
    found = document(a=singles(first), b=singles(second))
    assert found["benchmarks"]["humaneval"]["comparisons"][0]["verdict"] == verdict
    assert verdict in printed(found)
    assert ("no outcome could be significant" in printed(found)) == (verdict == "too few tasks")
    assert ("does not mean equal" in printed(found)) == (verdict == "not significant")


def test_many_comparisons_need_more_evidence():
    """Seven tasks of eight won: p 0.0156 alone, and 0.047 among three; with three more runs, not significant."""
    weak, strong, half = singles("--------"), singles("+++++++-"), singles("++++----")
    alone = benchmark_entry({"a": weak, "b": strong})["comparisons"]
    three = benchmark_entry({"a": weak, "b": strong, "c": half})["comparisons"]
    ten = benchmark_entry({"a": weak, "b": strong, "c": half, "d": half, "e": half})["comparisons"]
    assert [(f["p"], round(f["p_holm"], 4), f["verdict"]) for f in (alone[0], three[0], ten[0])] == [
        (2 / 128, 0.0156, "better"),
        (2 / 128, 0.0469, "better"),
        (2 / 128, 0.1562, "too few tasks"),
    ]


def test_verdict_is_of_p_raised_for_the_number_of_comparisons():
    """Six of nine tasks won: p 0.031 alone, 0.094 as the smallest of three."""
    weak, strong, between = singles("---------"), singles("++++++---"), singles("+++------")
    alone = benchmark_entry({"a": weak, "b": strong})["comparisons"][0]
    together = benchmark_entry({"a": weak, "b": strong, "c": between})["comparisons"][0]
    assert (alone["p"], alone["verdict"]) == (2 / 64, "better")
    assert (together["p"], together["verdict"]) == (2 / 64, "not significant")


def test_extra_tests_alone_do_not_pass_a_task():
    counts = benchmark_entry({"x": result([row(False, True)])})["runs"]["x"]["per_task"]["HumanEval/0"]
    assert (counts["plus"], counts["stock_plus"]) == (0, 0)


def test_evalplus_own_statuses_are_counted_apart():
    counts = benchmark_entry({"x": result([row(True, stock=False), row(False, stock=True), row(True)])})["runs"]["x"]["per_task"]
    assert counts["HumanEval/0"] == {"samples": 3, "base": 2, "plus": 2, "stock_base": 2, "stock_plus": 2}
    alone = benchmark_entry({"x": result([row(True, stock=False)])})["runs"]["x"]["per_task"]["HumanEval/0"]
    assert (alone["base"], alone["plus"], alone["stock_base"], alone["stock_plus"]) == (1, 1, 0, 0)


def test_rates_are_compared_by_sign_flips():
    few, many = ([[row(True)] * n + [row(False, False)] * (4 - n) for n in counts] for counts in ([1] * 8, [3] * 8))
    (found,) = benchmark_entry({"a": result(*few), "b": result(*many)})["comparisons"]
    assert found["test"] == "sign flips" and found["p"] == pytest.approx(2 / 256)
    assert found["difference"]["value"] == 0.5


def test_document_fits_its_schema_and_the_schema_refuses_what_does_not():
    found = document(base=singles("+-------"), router=singles("++++++++"))
    jsonschema.validate(found, SCHEMA)
    for spoil in ("versions", "sandbox", "benchmarks"):
        broken = copy.deepcopy(found)
        del broken[spoil]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)
    broken = copy.deepcopy(found)
    broken["benchmarks"]["humaneval"]["comparisons"][0]["verdict"] = "splendid"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_terminal_shows_scores_intervals_and_evalplus_own_value():
    difference = {"task_id": "HumanEval/1", "sample": 0, "tests": "base", "ours": "pass", "stock": "fail", "reason": "why\nso"}
    text = printed(document(base=singles("--------"), router=result(*[[row(True)]] * 8, differences=(difference,))))
    assert "0.000 [0.00, 0.37]" in text and "1.000 [0.63, 1.00]" in text and "0.125" in text
    assert "router against base" in text and "+1.000 [+0.43, +1.00]" in text and "0.0078" in text
    assert "router: HumanEval/1 sample 0 (base tests): pass, in EvalPlus 0.3.1 fail: why so" in text


def test_reports_are_complete_and_escape_what_they_show(tmp_path):
    found = document(base=singles("--------"), router=singles("++++++++"))
    paths = write_reports(found, tmp_path / "new")
    assert [path.name for path in paths] == list(REPORTS)
    assert json.loads(paths[0].read_text()) == found
    page = paths[1].read_text()
    assert "&lt;b&gt;&amp;my model" in page and "<b>&my" not in page
    assert "router against base" in page and "8 samples in 4.0 s" in page and "1 of 1" in page
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_reports_are_those_of_one_run_also_where_the_disk_is_full(tmp_path, file_size_limit):
    write_reports(document(router=singles("++++++++")), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = r"benchmark\.html: File too large; make room, then run the same command again"
    enough_for_the_first = len(before["benchmark.json"]) + 1000
    with file_size_limit(enough_for_the_first), pytest.raises(OutputError, match=told):
        write_reports(document(router=singles("-+++++++")), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_scores_from_without_a_sandbox_say_so():
    run = {**singles("++++++++"), "sandbox": "none"}
    assert "without a sandbox" in printed(document(router=run))
    assert "without a sandbox" in build_page(document(router=run)).html()
    assert "without a sandbox" not in printed(document(router=singles("++++++++")))


def test_page_of_one_run_has_no_comparison():
    assert "against" not in build_page(document(router=singles("+-+-"))).html().split("How it was made")[0].split("Scores")[1]
