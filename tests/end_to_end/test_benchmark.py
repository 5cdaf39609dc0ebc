"""The command benchmark on planted competence: the whole table is known before it runs, and so is every comparison."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import jsonschema
import pytest
import torch

import dylo_moe.benchmarks
from dylo_moe import benchmark
from harness.specimens.competence import Planted, plant
from harness.specimens.tasks import TASKS, write_task_set

GROUP = 4  # tasks of each of the two experts
OPTIONS = ["--dtype", "float32", "--max_new_tokens", "48", "--parallel", "1"]  # the longest planted answer has 39 tokens
RUNS = ("base", "router", "single:0", "single:1")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("planted"), num_experts=2, tasks_per_expert=GROUP, features="embedding")


@pytest.fixture(scope="module")
def call(planted, tmp_path_factory):
    """Runs the command in one directory; returns its document and what it printed."""
    directory = tmp_path_factory.mktemp("benchmark")
    mbpp = write_task_set(tmp_path_factory.mktemp("mbpp"), "mbpp", TASKS[:3])

    def run(*words: str) -> tuple[dict, str]:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(planted.task_file))
            patch.setenv("MBPP_OVERRIDE_PATH", str(mbpp))
            patch.setenv("COLUMNS", "140")
            options = [*OPTIONS, "--trained_model", str(planted.checkpoint), "--output_dir", str(directory)]
            assert benchmark.main([*options, *words]) == 0
        return json.loads((directory / "benchmark.json").read_text()), printed.getvalue()

    run.directory = directory
    return run


@pytest.fixture(scope="module")
def first(call) -> tuple[dict, str]:
    return call("--routing_strategy", "router", "single:0", "single:1")


def test_every_run_passes_exactly_the_tasks_that_were_planted(planted, first):
    runs = first[0]["benchmarks"]["humaneval"]["runs"]
    assert tuple(runs) == RUNS
    known = {
        "base": set(),
        "router": set(planted.records),
        "single:0": set(planted.groups[0]),
        "single:1": set(planted.groups[1]),
    }
    for name, run in runs.items():
        assert {task for task, counts in run["per_task"].items() if counts["plus"]} == known[name], name
        assert {task for task, counts in run["per_task"].items() if counts["stock_plus"]} == known[name], name
    scores = {name: run["pass_at_k"]["plus"]["pass@1"] for name, run in runs.items()}
    assert {name: score["value"] for name, score in scores.items()} == {
        "base": 0.0,
        "router": 1.0,
        "single:0": 0.5,
        "single:1": 0.5,
    }
    assert scores["base"]["low"] == 0.0 < scores["base"]["high"] < 0.4
    assert runs["router"]["stock"]["plus"]["pass@1"] == 1.0


def test_every_comparison_is_the_one_that_can_be_counted(planted, first):
    """Eight of eight: p = 2 / 2^8, and 0.047 as the smallest of six; four of four: 2 / 2^4; four against four: 1."""
    found = {(c["first"], c["second"]): c for c in first[0]["benchmarks"]["humaneval"]["comparisons"]}
    one, two = planted.groups
    expected = {
        ("base", "router"): ([*one, *two], [], 2 / 256, "better"),
        ("base", "single:0"): (one, [], 2 / 16, "not significant"),
        ("base", "single:1"): (two, [], 2 / 16, "not significant"),
        ("router", "single:0"): ([], two, 2 / 16, "not significant"),
        ("router", "single:1"): ([], one, 2 / 16, "not significant"),
        ("single:0", "single:1"): (two, one, 1.0, "not significant"),
    }
    assert {pair: (c["won"], c["lost"], pytest.approx(c["p"]), c["verdict"]) for pair, c in found.items()} == expected
    assert found["base", "router"]["p_holm"] == pytest.approx(6 * 2 / 256)


def test_reports_are_written_and_name_what_was_measured(planted, call, first):
    document, printed = first
    schema = json.loads((Path(dylo_moe.benchmarks.__file__).parent / "document.schema.json").read_text())
    jsonschema.validate(document, schema)
    found = document["benchmarks"]["humaneval"]
    assert found["generation"]["new_samples"] == 4 * 2 * GROUP and found["generation"]["samples_per_second"] > 0
    assert all((call.directory / run["samples_file"]).is_file() for run in found["runs"].values())
    assert document["identity"]["checkpoint"] and document["versions"]["torch"]
    assert "router against base" in printed and printed.splitlines()[-1] == str(call.directory / "benchmark.png")
    page = (call.directory / "benchmark.html").read_text()
    assert "single:1 against single:0" in page and str(planted.checkpoint) in page
    assert (call.directory / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_run_that_was_killed_goes_on_and_tells_the_same(call, first):
    before = first[0]["benchmarks"]["humaneval"]
    samples = call.directory / before["runs"]["router"]["samples_file"]
    journal = samples.with_suffix(".journal")
    journal.write_bytes(journal.read_bytes()[:-20])  # in the middle of the last sample
    samples.unlink()
    after = call("--routing_strategy", "router", "single:0", "single:1")[0]["benchmarks"]["humaneval"]
    assert after["generation"]["new_samples"] == 1
    assert {**after, "generation": None} == {**before, "generation": None}


def test_first_tasks_of_both_benchmarks_in_one_run(planted, call, first):
    document, printed = call("--routing_strategy", "single:0", "--benchmarks", "humaneval", "mbpp", "--max_samples", "2")
    known, other = document["benchmarks"]["humaneval"], document["benchmarks"]["mbpp"]
    assert known["tasks"] == list(planted.records)[:2] and other["tasks"] == ["Mbpp/1000", "Mbpp/1001"]
    assert {name: run["pass_at_k"]["plus"]["pass@1"]["value"] for name, run in known["runs"].items()} == {
        "base": 0,
        "single:0": 1,
    }
    assert (known["generation"]["new_samples"], other["generation"]["new_samples"]) == (0, 4)
    assert known["generation"]["samples_per_second"] is None
    assert known["comparisons"][0]["verdict"] == "too few tasks" and "no outcome could be significant" in printed
