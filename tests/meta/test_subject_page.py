"""docs/subjects.md is true: its example is judged by the command, passes, and fails when a fault is put into it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import main
from harness.specimens import write_base, write_checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "subjects.md"


def example() -> str:
    return re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    return write_checkpoint(root / "moe", write_base(root / "base", "llama"), num_experts=4)


@pytest.fixture
def judged(tmp_path, checkpoint, monkeypatch) -> Callable[[str, str], tuple[int, dict[str, str]]]:
    """judged(source, only) -> exit code, and outcome by law."""

    def judge(source: str, only: str) -> tuple[int, dict[str, str]]:
        (tmp_path / "my_moe.py").write_text(source)
        code = main(["--subject", "my_moe:make", "--checkpoint", str(checkpoint), "--only", only])
        verdict = json.loads((tmp_path / "validation" / "verdict.json").read_text())
        return code, {check["id"]: check["outcome"] for check in verdict["checkpoints"][0]["checks"]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield judge
    sys.modules.pop("my_moe", None)  # the next test has another one


def test_the_example_is_short_and_does_what_the_page_says(judged):
    source = example()
    assert len(source.splitlines()) < 40
    code, outcomes = judged(source, "model.*,equivalence.*,formats.bad_weights_refused")
    assert outcomes.pop("formats.bad_weights_refused") == "fail"
    assert set(outcomes.values()) == {"pass", "not applicable"}, outcomes
    assert list(outcomes.values()).count("pass") >= 15
    assert code == 1


def test_a_fault_in_the_example_is_found(judged):
    faulty = example().replace("enumerate(names)", "enumerate(names[::-1])")
    assert faulty != example()
    law = "model.routed_logits_equal_reference"
    assert judged(faulty, law) == (1, {law: "fail"})


RETURNED = "return self.base(input_ids, attention_mask)"
ASKED = "        self.weights = self.last_routing_weights = routing_weights\n"


def test_model_that_returns_a_tuple_is_told_so_and_is_no_failure_of_the_judge(judged, capsys):
    faulty = example().replace(RETURNED, RETURNED + ".to_tuple()")
    law = "model.routing_is_applied"
    assert judged(faulty, law) == (1, {law: "fail"})
    assert "returned a tuple without .logits" in capsys.readouterr().out


def test_model_that_refuses_weights_for_each_layer_is_not_failed(judged):
    refusing = example().replace(
        ASKED, "        if routing_weights.dim() == 4:\n            raise ValueError('one for all')\n" + ASKED
    )
    assert refusing != example()
    law = "model.routing_is_applied"
    assert judged(refusing, law) == (0, {law: "pass"})
