"""Every command in the pages of docs/ runs, in the order of its page, on a tiny checkpoint whose scores are known.

`validate_moe_modifications` without --only would run every law for each of its lines: here it gets one law (the whole command is
what README and `tests/meta/test_cli.py` are about); everything else runs as it stands in the page.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.specimens.competence import Planted, plant

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("strategies", "report", "debugging")
PROGRAMS = {"dylo-moe": "dylo_moe.cli", "validate_moe_modifications": "harness.cli"}


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's bash blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    torch.set_num_threads(1)
    return plant(tmp_path_factory.mktemp("planted"), num_experts=2, tasks_per_expert=2, features="embedding")


def run(words: list[str], planted: Planted, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, in `cwd`."""
    words = [{"DIR": str(planted.checkpoint), "OUT": "out"}.get(word, word) for word in words]
    if words[0] == "validate_moe_modifications" and "--only" not in words:
        words += ["--only", "layer.equals_oracle"]
    environment = {**os.environ, "HUMANEVAL_OVERRIDE_PATH": str(planted.task_file), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_page_succeeds(name: str, planted: Planted, tmp_path: Path) -> None:
    page = DOCS / f"{name}.md"
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        (tmp_path / "gate.toml").write_text(block, encoding="utf-8")
    found = commands(page)
    assert found
    for words in found:
        done = run(words, planted, tmp_path)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_a_wrong_command_is_found(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```bash\n# a comment\ndylo-moe inspect DIR --jsn\n```\n", encoding="utf-8")
    (words,) = commands(tmp_path / "page.md")
    assert run(words, planted, tmp_path).returncode == 2


def test_every_page_is_named_in_the_readme_and_every_link_leads_somewhere() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name in readme, page.name
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
