"""`dylo-moe codegen` in parts, and with a full disk: the files are those of one undisturbed command."""

from __future__ import annotations

from pathlib import Path

import pytest

from dylo_moe.cli import main
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

NUMBER = 2


@pytest.fixture(scope="module")
def codegen(tmp_path_factory):
    """Runs the command with a root of its own and returns its exit code."""
    place = tmp_path_factory.mktemp("interrupted")
    checkpoint = write_checkpoint(place / "checkpoint", write_base(place / "base", "llama"), num_experts=2)

    def run(root: Path, *words: str) -> int:
        options = "--dataset humaneval --temperature 0.8 --n-samples 2 --dtype float32 --max-new-tokens 16".split()
        return main(["codegen", "--model", str(checkpoint), "--root", str(root), *options, *words])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(place / "tasks", "humaneval", TASKS[:NUMBER])))
        yield run


@pytest.fixture(scope="module")
def undisturbed(codegen, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    assert codegen(place) == 0
    return place


def exports(root: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (root / "humaneval").glob("*.json*") if ".shard-" not in path.name}
    assert len(found) == 3
    return found


def test_parts_are_merged_to_what_one_command_writes(codegen, undisturbed, tmp_path, capsys):
    count = NUMBER + 1  # the last part has no task
    for number in range(count):
        assert codegen(tmp_path, "--shard", f"{number + 1}/{count}") == 0
        if number + 1 < count:
            assert main(["merge", str(tmp_path)]) == 2
    last = tmp_path / "humaneval" / capsys.readouterr().out.splitlines()[-1]
    assert last.name.endswith(".shard-3-of-3.jsonl") and last.read_bytes() == b""
    assert main(["merge", str(tmp_path)]) == 0
    assert exports(tmp_path) == exports(undisturbed)
    assert capsys.readouterr().out.splitlines() == [str(last).replace(".shard-3-of-3", "")]


def test_full_disk_is_one_line_and_the_same_command_continues(codegen, undisturbed, tmp_path, capsys, file_size_limit):
    (whole,) = undisturbed.rglob("*.journal")
    identity, sample, *_ = whole.read_bytes().splitlines(keepends=True)
    with file_size_limit(len(identity) + int(len(sample) * 1.5)):
        assert codegen(tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dylo-moe: ") and "make room, then run the same command again" in said
    (journal,) = tmp_path.rglob("*.journal")
    kept = journal.read_bytes()
    assert 1 < kept.count(b"\n") < 1 + 2 * NUMBER
    assert codegen(tmp_path) == 0
    assert exports(tmp_path) == exports(undisturbed)
    assert journal.read_bytes().startswith(kept)
