"""Experts are found to be good at exactly what they were taught, and a router that errs is found to err."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe import cli, expert_analysis
from fixtures.loads import counted_loads
from harness.specimens.competence import Planted, plant
from tests.browser import assert_readable, look

E = 3
KINDS = ("strings", "numbers", "lists")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("planted"), num_experts=E, tasks_per_expert=1, features="embedding")


def analyse(planted: Planted, checkpoint: Path, output: Path, *options: str) -> dict:
    """What the command writes, read back and held against its schema."""
    words = ["expert-analysis", "--model", str(checkpoint), "--output-dir", str(output), "--parallel", "1", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(planted.task_file))
        loads = counted_loads(patch)
        assert cli.main([*words, "--dtype", "float32", "--max-new-tokens", "128"]) == 0
        assert loads == [str(planted.base)], "one load to generate and to analyse"
    document = json.loads((output / "expert_analysis.json").read_text())
    schema = resources.files("dylo_moe.expertise").joinpath("document.schema.json").read_text()
    jsonschema.validate(document, json.loads(schema), jsonschema.Draft202012Validator)
    return document


@pytest.fixture(scope="module")
def right(planted, tmp_path_factory) -> tuple[dict, Path]:
    """Of the checkpoint as planted, with a category for each expert's task."""
    output = tmp_path_factory.mktemp("right")
    kinds = {task: kind for group, kind in zip(planted.groups, KINDS, strict=True) for task in group}
    (output / "kinds.json").write_text(json.dumps(kinds))
    options = ("--routing_strategy", "base", "--categories", str(output / "kinds.json"))
    return analyse(planted, planted.checkpoint, output, *options), output


@pytest.fixture(scope="module")
def wrong(planted, tmp_path_factory) -> tuple[dict, Path]:
    """Of a copy whose router sends everything to expert 0, and whose expert 2 was never trained."""
    checkpoint = shutil.copytree(planted.checkpoint, tmp_path_factory.mktemp("wrong") / "checkpoint")
    gate = load_file(checkpoint / "router.safetensors")
    save_file({**gate, "gate.bias": torch.tensor([1e4, 0.0, 0.0])}, checkpoint / "router.safetensors", metadata={"format": "pt"})
    file = checkpoint / "experts" / "expert_2" / "adapter_model.safetensors"
    tensors = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    output = checkpoint.parent / "out"
    return analyse(planted, checkpoint, output), output


def test_each_expert_is_best_at_its_own_category_and_at_nothing_else(planted, right):
    found = right[0]["benchmarks"]["humaneval"]
    rows = found["categories"]["rows"]
    assert [row["category"] for row in rows] == list(KINDS)
    assert [[one["value"] for one in row["experts"]] for row in rows] == np.eye(E).tolist()
    assert [row["best"] for row in rows] == [[0], [1], [2]]
    assert not any(row["clear"] for row in rows), "one task proves nothing"
    assert sum(expert["load"] for expert in found["experts"]) == pytest.approx(1)
    for expert in found["experts"]:
        assert expert["pass@1"]["value"] == pytest.approx(1 / E)
        assert expert["pass@1"]["low"] < 1 / E < expert["pass@1"]["high"]
        assert (expert["best_on"], expert["alone_on"], expert["chosen_on"]) == (1, 1, 1)
        assert expert["against_base"]["difference"]["value"] == pytest.approx(1 / E)


def test_router_that_was_taught_has_no_regret(planted, right):
    found = right[0]["benchmarks"]["humaneval"]
    routing = found["routing"]
    assert found["oracle"]["value"] == routing["router"] == routing["chosen"] == 1.0
    assert (routing["regret"]["value"], routing["by_choice"], routing["by_mixing"]) == (0, 0, 0)
    assert routing["confusion"] == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert (routing["agreed"], routing["possible"], routing["picked_wrong"], routing["nobody"]) == (E, E, [], 0)
    assert found["best"]["regret"]["value"] == 0 and routing["same_as_best"] == E
    owner = {task: expert for expert, group in enumerate(planted.groups) for task in group}
    for row in found["per_task"]:
        assert row["passing"] == [row["chosen"]] == [row["best"]] == [owner[row["task_id"]]]
        assert row["answer"][row["chosen"]] == max(row["answer"])
    assert found["redundancy"]["dispensable"] == {"alone": [], "together": []}
    assert np.array(found["redundancy"]["jaccard"]).tolist() == np.eye(E).tolist()


def test_router_that_sends_all_to_one_expert_has_the_regret_of_what_the_others_pass(planted, wrong):
    found = wrong[0]["benchmarks"]["humaneval"]
    routing, others = found["routing"], planted.groups[1]
    assert found["oracle"]["value"] == pytest.approx(2 / 3)
    assert routing["regret"]["value"] == routing["by_choice"] == pytest.approx(1 / 3)
    assert (routing["by_mixing"], routing["agreed"], routing["possible"]) == (0, 1, 2)
    assert routing["picked_wrong"] == [{"task_id": task, "chosen": 0, "passing": [1], "router": 0.0} for task in others]
    assert [expert["chosen_on"] for expert in found["experts"]] == [3, 0, 0]
    assert found["redundancy"]["dispensable"]["together"] == [2]


def test_what_is_wrong_is_said_in_plain_words(right, wrong):
    said = "\n".join(wrong[0]["remarks"] + wrong[0]["benchmarks"]["humaneval"]["remarks"])
    for line in (
        "expert 2 changes nothing",
        "expert 2 passes no task",
        "expert 1 is never routed to",
        "the router weighs expert 0 most on 3 of 3 tasks",
        "on 1 of 2 tasks that an expert passes, the router weighs most one that does not",
        "could go without a task being lost: expert 2",
        "no categories",
    ):
        assert line in said
    calm = right[0]["remarks"] + right[0]["benchmarks"]["humaneval"]["remarks"]
    assert calm == ["only 3 tasks: the intervals are wide"]
    assert wrong[0]["weights"]["without_effect"] == [2] and wrong[0]["weights"]["cosine"][2] == [None] * E


def test_same_command_again_generates_nothing_and_says_the_same(planted, right, capfd):
    document, output = right
    kept = {path: path.read_bytes() for path in (output / "humaneval").glob("*.journal")}
    options = ("--routing-strategy", "base", "--categories", str(output / "kinds.json"), "--json")
    capfd.readouterr()
    again = analyse(planted, planted.checkpoint, output, *options)
    assert {**again, "date": ""} == {**document, "date": ""}
    assert {path: path.read_bytes() for path in (output / "humaneval").glob("*.journal")} == kept and len(kept) == E + 3
    assert json.loads(capfd.readouterr().out) == again


def test_page_opens_offline_on_a_phone_and_holds_everything(right):
    page = right[1] / "expert_analysis.html"
    seen = look(page, "table", "img")
    assert_readable(seen)
    assert seen.title == "Expert analysis"
    assert seen.visible == {"table": 7, "img": 7}
    for text in ("HumanEval/0", "regret (oracle - router)", "strings", "only 3 tasks"):
        assert text in seen.text
    assert sorted(path.name for path in right[1].glob("*.png")) == sorted(
        [f"expert_analysis_{name}.png" for name in ("cosine", "writes")]
        + [
            f"expert_analysis_humaneval_{name}.png"
            for name in ("categories", "confusion", "pass_at_1", "same_tasks", "same_tokens")
        ]
    )


def test_mistakes_are_one_line_before_anything_is_generated(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(planted.task_file))
    (tmp_path / "bad.json").write_text("{}")
    model = ["--model", str(planted.checkpoint), "--output-dir", str(tmp_path / "out")]
    for words, message in (
        ([], "no model, but should be one of"),
        ([*model, "--categories", str(tmp_path / "bad.json")], "bad.json: none of its 0 task ids"),
        ([*model, "--routing-strategy", "single:7"], "single:7"),
        ([*model, "--sandbox", "vm"], "invalid choice"),
        (["--model", str(planted.base)], "a merged model has no experts to compare"),
    ):
        try:
            code = expert_analysis.main(words)
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr().err.strip()
        assert (code, message in said, "\n" in said) == (2, True, False), said
    assert not list(tmp_path.rglob("*.journal"))
