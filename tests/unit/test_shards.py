"""Shards of a run: what becomes the whole run, and everything that is refused instead."""

from __future__ import annotations

import shutil

import pytest

from dylo_moe.cli import main
from dylo_moe.errors import OptionError, SampleFileError
from dylo_moe.journal import Record, parse_shard, shard_text
from dylo_moe.samples import SampleJournal, sample_stem
from dylo_moe.shards import merge_shards

IDENTITY = {"checkpoint": "abc", "options": {"routing_strategy": "router"}, "versions": {"torch": "2.13.0"}}
VERSIONS = {"dylo-moe": "0"}
TASKS = [f"T/{number}" for number in (3, 1, 4, 15, 9, 2, 6)]


def record(task, index, text=""):
    return Record(task, index, f"solution {task} {index} {text}", "raw", "noted" if index else "")


def write(directory, *, shard=None, identity=IDENTITY, chosen=TASKS, n_samples=2, text=""):
    """What a run (or a shard of it) leaves in `directory`."""
    stem = sample_stem("m", ["router"], identity)
    own = chosen if shard is None else chosen[shard[0] :: shard[1]]
    with SampleJournal(directory, stem, identity, shard=shard) as journal:
        for task in own:
            journal.append(record(task, index, text) for index in reversed(journal.missing(task, n_samples)))
        return journal.export(TASKS, n_samples, VERSIONS, chosen=chosen)


def write_all(directory, count=3, **options):
    for number in range(count):
        write(directory, shard=(number, count), **options)


def exports(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.json*") if ".shard-" not in path.name}


def journal_of(directory, shard="2-of-3"):
    (path,) = directory.rglob(f"*.shard-{shard}.journal")
    return path


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_merged_shards_are_byte_for_byte_what_one_process_writes(tmp_path, count):
    write(tmp_path / "one")
    write_all(tmp_path / "parts", count)
    (path,) = merge_shards([tmp_path / "parts"])
    assert exports(tmp_path / "parts") == exports(tmp_path / "one") != {}
    assert path.read_bytes().count(b"\n") == len(TASKS) * 2
    before = exports(tmp_path / "parts")
    assert merge_shards([tmp_path / "parts"]) == [path]
    assert exports(tmp_path / "parts") == before


def test_shards_of_several_machines_are_merged_beside_the_first(tmp_path):
    for number, machine in enumerate(("a", "b", "c")):
        write(tmp_path / machine / "humaneval", shard=(number, 3))
    paths = merge_shards([tmp_path / machine for machine in ("c", "a", "b")])
    assert [path.parent for path in paths] == [tmp_path / "a" / "humaneval"]


def test_several_runs_in_one_directory_are_merged_each_with_its_own(tmp_path):
    other = {**IDENTITY, "checkpoint": "other"}
    write_all(tmp_path)
    write_all(tmp_path, 2, identity=other, text="other")
    assert len(merge_shards([tmp_path])) == 2
    write(tmp_path / "one", identity=other, text="other")
    assert exports(tmp_path / "one").items() <= exports(tmp_path).items()


def test_merged_run_continues_as_one_process_or_as_shards(tmp_path):
    write_all(tmp_path)
    (path,) = merge_shards([tmp_path])
    assert write(tmp_path, n_samples=3) == path
    assert path.read_bytes() == write(tmp_path / "one", n_samples=3).read_bytes()
    write_all(tmp_path / "more", n_samples=2)
    merge_shards([tmp_path / "more"])
    write_all(tmp_path / "more", n_samples=3)
    merge_shards([tmp_path / "more"])
    assert exports(tmp_path / "more") == exports(tmp_path / "one")


def refused(directories, word):
    before = {path for directory in directories for path in directory.rglob("*.json*") if ".shard-" not in path.name}
    with pytest.raises(SampleFileError, match=word) as caught:
        merge_shards(directories)
    assert "\n" not in str(caught.value)
    assert before == {path for directory in directories for path in directory.rglob("*.json*") if ".shard-" not in path.name}


def test_directory_without_shards_is_refused(tmp_path):
    refused([tmp_path], "no shards here")
    refused([tmp_path / "nowhere"], "no shards here")


def test_missing_shards_are_named(tmp_path):
    write_all(tmp_path)
    journal_of(tmp_path, "1-of-3").unlink()
    journal_of(tmp_path, "3-of-3").unlink()
    refused([tmp_path], "shard 1/3, 3/3 of its run is missing$")


def test_shard_made_with_another_version_is_named_with_the_difference(tmp_path):
    write_all(tmp_path)
    journal_of(tmp_path).unlink()
    write(tmp_path, shard=(1, 3), identity={**IDENTITY, "versions": {"torch": "2.12.0"}})
    refused([tmp_path], "missing; .* another run: versions.torch 2.12.0, here 2.13.0|versions.torch 2.13.0, here 2.12.0")


def test_shards_of_different_counts_are_refused(tmp_path):
    write_all(tmp_path)
    write(tmp_path, shard=(0, 2))
    refused([tmp_path], "one of [23] shards, but .* is one of [23]")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n_samples": 3}, "[23] samples of each task, but [23]"),
        ({"chosen": TASKS[1:]}, "[67] tasks from T/[31], but [67] from T/[31]"),
        ({"chosen": [TASKS[1], TASKS[0], *TASKS[2:]]}, "7 tasks from T/[31], but 7 from T/[31]"),
    ],
)
def test_shards_of_different_requests_are_refused(tmp_path, options, word):
    write(tmp_path, shard=(0, 3))
    write(tmp_path, shard=(1, 3), **options)
    write(tmp_path, shard=(2, 3))
    refused([tmp_path], word)


def test_unfinished_shard_is_refused(tmp_path):
    write_all(tmp_path)
    path = journal_of(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    refused([tmp_path], "not finished; run the command of this shard again")
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    refused([tmp_path], "sample 0 of T/1 is missing")


def test_shard_cut_at_any_byte_is_refused(tmp_path):
    write_all(tmp_path, chosen=TASKS[:3], n_samples=1)
    path = journal_of(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused([tmp_path], "cut off|not finished")
    path.write_bytes(content)
    merge_shards([tmp_path])


def test_shard_with_a_changed_byte_is_refused(tmp_path):
    write_all(tmp_path, chosen=TASKS[:3], n_samples=1)
    path = journal_of(tmp_path)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused([tmp_path], "damaged|cut off|not finished")


def test_different_samples_of_one_task_are_refused_and_equal_ones_are_not(tmp_path):
    write_all(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    merge_shards([tmp_path])
    write(tmp_path / "again", shard=(1, 3), text="other")
    refused([tmp_path], "different samples as the same shard")


def test_samples_that_contradict_the_whole_run_are_refused(tmp_path):
    write_all(tmp_path)
    write(tmp_path, text="other", n_samples=1)
    refused([tmp_path], "sample 0 of T/. is another one")


def test_renamed_shard_is_refused(tmp_path):
    write_all(tmp_path)
    path = journal_of(tmp_path)
    path.rename(path.with_name(path.name.replace("2-of-3", "2-of-4")))
    refused([tmp_path], "the name of another file")


def test_command_prints_the_paths_and_a_mistake_is_one_line(tmp_path, capsys):
    write_all(tmp_path)
    assert main(["merge", str(tmp_path)]) == 0
    assert (
        capsys.readouterr().out
        == f"{next(p for p in tmp_path.glob('*.jsonl') if '.shard' not in p.name and '.raw' not in p.name)}\n"
    )
    journal_of(tmp_path).unlink()
    assert main(["merge", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "shard 2/3" in said.err and said.out == ""


def test_shards_are_written_from_one_on():
    assert [parse_shard(text) for text in ("1/1", "1/4", "4/4")] == [(0, 1), (0, 4), (3, 4)]
    assert shard_text(parse_shard("2/4")) == "2/4"


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/b", "-1/4", "1/4/2", "", (0, 4), "²/4"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(OptionError, match="1/4, 2/4"):
        parse_shard(text)
