"""docs/subjects.md is true: its example is judged by the command, passes, and fails when a fault is put into it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.specimens import write_base, write_checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "subjects.md"


def example() -> str:
    return re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    return write_checkpoint(root / "moe", write_base(root / "base", "llama"), num_experts=4)


def judged(directory: Path, checkpoint: Path, source: str, only: str) -> tuple[int, dict[str, str]]:
    """Exit code, and outcome by law."""
    (directory / "my_moe.py").write_text(source)
    command = [sys.executable, "-m", "harness.cli", "--subject", "my_moe:make", "--checkpoint", str(checkpoint), "--only", only]
    done = subprocess.run(command, cwd=directory, capture_output=True, check=False)
    verdict = json.loads((directory / "validation" / "verdict.json").read_text())
    return done.returncode, {check["id"]: check["outcome"] for check in verdict["checkpoints"][0]["checks"]}


def test_the_example_is_short_and_does_what_the_page_says(tmp_path, checkpoint):
    source = example()
    assert len(source.splitlines()) < 40
    code, outcomes = judged(tmp_path, checkpoint, source, "model.*,equivalence.*,formats.bad_weights_refused")
    assert outcomes.pop("formats.bad_weights_refused") == "fail"
    assert set(outcomes.values()) == {"pass", "not applicable"}, outcomes
    assert list(outcomes.values()).count("pass") >= 15
    assert code == 1


def test_a_fault_in_the_example_is_found(tmp_path, checkpoint):
    faulty = example().replace("enumerate(names)", "enumerate(names[::-1])")
    assert faulty != example()
    law = "model.routed_logits_equal_reference"
    assert judged(tmp_path, checkpoint, faulty, law) == (1, {law: "fail"})
