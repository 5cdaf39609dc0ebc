"""Every command in the pages of docs/ runs, in the order of its page, on a tiny checkpoint whose scores are known.

`validate_moe_modifications` without --only would run every law for each of its lines: here it gets one law (the whole command is
what README and `tests/meta/test_cli.py` are about); everything else runs as it stands in the page.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import dylo_moe.cli
import harness.cli
from harness.specimens.competence import Planted, plant

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("quickstart", "strategies", "report", "debugging", "migrating")


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


def run(words: list[str], planted: Planted) -> int:
    """The exit code of one line; DIR is the planted checkpoint."""
    program, *options = [{"DIR": str(planted.checkpoint), "OUT": "out"}.get(word, word) for word in words]
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


def test_a_wrong_command_is_found(planted: Planted, place: Path) -> None:
    (place / "page.md").write_text("```bash\n# a comment\ndylo-moe inspect DIR --jsn\n```\n", encoding="utf-8")
    (words,) = commands(place / "page.md")
    assert run(words, planted) == 2


def test_every_page_is_named_in_the_readme_and_every_link_leads_somewhere() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name in readme, page.name
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
