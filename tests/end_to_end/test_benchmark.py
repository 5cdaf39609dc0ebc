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
from dylo_moe import benchmark, cli
from fixtures.loads import counted_loads
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
def codegen(planted, tmp_path_factory):
    """Generates with the router into a directory; the tasks are the planted ones for all commands of this file."""

    def run(root: Path, *words: str) -> None:
        options = ["--model", str(planted.checkpoint), "--dataset", "humaneval", "--greedy", "--root", str(root)]
        assert cli.main(["codegen", *options, *OPTIONS[:4], *words]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(planted.task_file))
        yield run


@pytest.fixture(scope="module")
def merged(codegen, tmp_path_factory) -> Path:
    """The router's samples, as a batch scheduler makes them: two shards, and both merged."""
    root = tmp_path_factory.mktemp("benchmark")
    for shard in ("1/2", "2/2"):
        codegen(root, "--shard", shard)
    assert cli.main(["merge", str(root / "humaneval")]) == 0
    return next(path for path in root.rglob("*.raw.jsonl") if ".shard-" not in path.name)


@pytest.fixture(scope="module")
def call(planted, merged, tmp_path_factory):
    """Runs the command in one directory; returns its document and what it printed. call.loads: base models that it loaded."""
    directory = merged.parents[1]
    mbpp = write_task_set(tmp_path_factory.mktemp("mbpp"), "mbpp", TASKS[:3])

    def run(*words: str) -> tuple[dict, str]:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setenv("MBPP_OVERRIDE_PATH", str(mbpp))
            patch.setenv("COLUMNS", "140")
            run.loads = counted_loads(patch)
            options = [*OPTIONS, "--trained_model", str(planted.checkpoint), "--output_dir", str(directory)]
            assert benchmark.main([*options, *words]) == 0
        return json.loads((directory / "benchmark.json").read_text()), printed.getvalue()

    run.directory = directory
    return run


@pytest.fixture(scope="module")
def first(call) -> tuple[dict, str]:
    made = call("--routing_strategy", "router", "single:0", "single:1")
    call.loads_of_first = call.loads
    return made


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
    assert found["generation"]["new_samples"] == 3 * 2 * GROUP, "the router's were there"
    assert found["generation"]["samples_per_second"] > 0
    assert all((call.directory / run["samples_file"]).is_file() for run in found["runs"].values())
    assert document["identity"]["checkpoint"] and document["versions"]["torch"]
    assert "router against base" in printed and printed.splitlines()[-1] == str(call.directory / "benchmark.png")
    page = (call.directory / "benchmark.html").read_text()
    assert "single:1 against single:0" in page and str(planted.checkpoint) in page
    assert (call.directory / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_one_load_serves_the_base_and_every_strategy_of_the_trained_model(planted, call, first):
    assert call.loads_of_first == [str(planted.base)]


def test_samples_of_a_batch_scheduler_are_those_of_one_process_and_are_taken_as_they_are(merged, call, first, codegen, tmp_path):
    codegen(tmp_path)
    files = [path for path in (tmp_path / "humaneval").iterdir() if path.suffix in (".json", ".jsonl")]
    assert len(files) == 3
    for path in files:
        assert (merged.parent / path.name).read_bytes() == path.read_bytes(), path.name
    assert str(merged).removesuffix(".raw.jsonl") + ".jsonl" == str(
        call.directory / first[0]["benchmarks"]["humaneval"]["runs"]["router"]["samples_file"]
    )


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
    options = ["--routing_strategy", "single:0", "round_robin", "--benchmarks", "humaneval", "mbpp", "--max_samples", "2"]
    document, printed = call(*options)
    known, other = document["benchmarks"]["humaneval"], document["benchmarks"]["mbpp"]
    assert known["tasks"] == list(planted.records)[:2] and other["tasks"] == ["Mbpp/1000", "Mbpp/1001"]
    assert {name: run["pass_at_k"]["plus"]["pass@1"]["value"] for name, run in known["runs"].items()} == {
        "base": 0,
        "single:0": 1,
        "round_robin": 1,
    }
    assert (known["generation"]["new_samples"], other["generation"]["new_samples"]) == (2, 6)
    assert call.loads == [str(planted.base)], "one load serves both benchmarks"
    document, as_json = call(*options, "--json")
    assert json.loads(as_json) == document
    again = document["benchmarks"]["mbpp"]["generation"]
    assert (again["new_samples"], again["samples_per_second"], call.loads) == (0, None, [])
    assert known["comparisons"][0]["verdict"] == "too few tasks" and "no outcome could be significant" in printed
