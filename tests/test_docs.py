"""Every block in README and in the pages of docs/ runs, in the order of its page, on tiny checkpoints.

`validate_moe_modifications` without --only would run every law for each of its lines: here it gets one law (the whole command is
what `tests/meta/test_cli.py` is about). The checkpoint has learnt nothing of MBPP+ and would write to the limit, which is
lowered. Everything else runs as it stands in the page. Two pages have tests of their own: findings.md (test_findings.py) and
subjects.md (meta/test_subject_page.py). The lines of README that install are those with which tox runs these tests.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dylo_moe.cli
import harness.cli
from harness.specimens import write_checkpoint
from harness.specimens.competence import Planted, plant
from harness.specimens.tasks import TASKS, write_task_set

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("quickstart", "strategies", "report", "debugging", "migrating")
ELSEWHERE = ("findings", "subjects")
README = DOCS.parent / "README.md"


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's bash blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("planted"), num_experts=2, tasks_per_expert=2, features="embedding")


@pytest.fixture
def place(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and the planted tasks for HumanEval+."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(planted.task_file))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(words: list[str], planted: Planted, **more: object) -> int:
    """The exit code of one line; DIR is the planted checkpoint. more: what else a word stands for."""
    meant = {"DIR": planted.checkpoint, "OUT": "out", **more}
    program, *options = [str(meant.get(word, word)) for word in words]
    if "mbpp" in options:
        options += ["--max-new-tokens", "16"]
    if program == "dylo-moe":
        try:
            return dylo_moe.cli.main(options)
        except SystemExit as end:
            return int(end.code)
    assert program == "validate_moe_modifications"
    options += [] if "--only" in options else ["--only", "layer.equals_oracle"]
    return harness.cli.main(options)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_page_succeeds(name: str, planted: Planted, place: Path) -> None:
    page = DOCS / f"{name}.md"
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        (place / "gate.toml").write_text(block, encoding="utf-8")
    found = commands(page)
    assert found
    for words in found:
        assert run(words, planted) == 0, shlex.join(words)


def test_pages_with_blocks_are_all_run() -> None:
    assert {page.stem for page in DOCS.glob("*.md") if "```" in page.read_text(encoding="utf-8")} == {*PAGES, *ELSEWHERE}


@pytest.fixture
def four(planted: Planted, tmp_path: Path) -> Path:
    """A checkpoint that every target of `convert` can hold."""
    return write_checkpoint(tmp_path / "four", planted.base, num_experts=4)


def test_every_command_of_the_readme_succeeds(planted: Planted, four: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(write_task_set(place / "mbpp", "mbpp", TASKS[:1])))
    (place / "categories.json").write_text(json.dumps(dict.fromkeys(planted.records, "all")), encoding="utf-8")
    found = [words for words in commands(README) if words[0] != "python3"]
    assert len(commands(README)) == len(found) + 2
    subject = {"your_package.module:factory": "harness.subjects.naive_loop:make"}
    for number, words in enumerate(found):
        meant = {"IN": four, "OUT": f"out{number}", "PATH": planted.base, **subject}
        assert run(words, planted, **meant) == 0, shlex.join(words)


def test_every_python_block_of_the_readme_runs(planted: Planted, four: Path, place: Path) -> None:
    ids = torch.arange(5, 11)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(planted.base), four / "experts/expert_0", "expert_0")
    for number in range(1, 4):
        stock.load_adapter(four / f"experts/expert_{number}", f"expert_{number}")
    names = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "peft_model": stock,
        "hidden_size": stock.config.hidden_size,
    }
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block.replace("path/to/checkpoint", str(four)), names)


def test_a_wrong_command_is_found(planted: Planted, place: Path) -> None:
    (place / "page.md").write_text("```bash\n# a comment\ndylo-moe inspect DIR --jsn\n```\n", encoding="utf-8")
    (words,) = commands(place / "page.md")
    assert run(words, planted) == 2


def test_every_page_is_named_in_the_readme_and_every_link_leads_somewhere() -> None:
    readme = README.read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name in readme, page.name
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
