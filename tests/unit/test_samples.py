"""The sample journal: what survives, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dylo_moe.atomic import write_atomically
from dylo_moe.errors import SampleFileError
from dylo_moe.journal import Record
from dylo_moe.samples import SampleJournal, sample_stem
from dylo_moe.sanitizing import Sanitizer

IDENTITY = {"schema": 1, "checkpoint": "abc", "options": {"routing_strategy": "router"}}
VERSIONS = {"dylo-moe": "0"}


def records(task, count, first=0):
    return [Record(task, first + i, f"solution {task} {first + i} \ud800", f"raw\n{i}") for i in range(count)]


def opened(directory, identity=None, **options):
    identity = identity or IDENTITY
    return SampleJournal(directory, sample_stem("m", ["router"], identity), identity, **options)


def rows(path):
    return [(row["task_id"], row["solution"]) for row in map(json.loads, path.read_text().splitlines())]


def test_samples_come_back_in_a_later_run(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 2))
    with opened(tmp_path) as journal:
        assert journal.records == {"T/0": dict(enumerate(records("T/0", 2)))}
        journal.append(records("T/0", 1, first=2))
    with opened(tmp_path) as journal:
        assert journal.missing("T/0", 3) == []
        assert journal.missing("T/1", 2) == [0, 1]


def test_every_cut_of_the_last_lines_loses_only_what_was_cut(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 1))
        whole = len(journal.path.read_bytes())
        journal.append(records("T/1", 1))
        journal.append(records("T/2", 1))
        path = journal.path
    content = path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        kept = content[:length].count(b"\n") - 1
        with opened(tmp_path) as journal:
            missing = [t for t in ("T/0", "T/1", "T/2") if journal.missing(t, 1)]
            assert len(missing) == 3 - kept
            for task in missing:
                journal.append(records(task, 1))
        assert path.read_bytes() == content


@pytest.mark.parametrize("tail", [b"\0" * 64, b"{}\n", b"0123456789abcdef {}\n\n\n"])
def test_garbage_at_the_end_is_cut_off(tmp_path, tail):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 1))
    content = journal.path.read_bytes()
    journal.path.write_bytes(content + tail)
    with opened(tmp_path) as journal:
        assert journal.missing("T/0", 3) == [1, 2]
    assert journal.path.read_bytes() == content


def test_journal_cut_inside_its_first_line_starts_again(tmp_path):
    with opened(tmp_path) as journal:
        pass
    journal.path.write_bytes(journal.path.read_bytes()[:-3])
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 1))
    with opened(tmp_path) as journal:
        assert journal.missing("T/0", 3) == [1, 2]


def test_damage_before_a_whole_line_is_refused(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 3))
    content = journal.path.read_bytes()
    journal.path.write_bytes(content.replace(b"T/0 1", b"T/0 7"))
    with pytest.raises(SampleFileError, match="damaged after 2 lines; move it away, or generate it anew with --resume=False"):
        opened(tmp_path).__enter__()


def test_journal_of_another_identity_is_refused(tmp_path):
    with opened(tmp_path) as journal:
        stem = journal.path.stem
    with pytest.raises(SampleFileError, match="another run"):
        SampleJournal(tmp_path, stem, {**IDENTITY, "checkpoint": "other"}).__enter__()


@pytest.mark.parametrize("field", ["checkpoint", "schema", "options"])
def test_any_difference_in_identity_gives_another_file(field):
    assert sample_stem("m", [], {**IDENTITY, field: "other"}) != sample_stem("m", [], IDENTITY)


def test_stem_is_a_plain_file_name_whatever_the_label_is():
    stem = sample_stem("../../a b/ü:x" * 50, ["single:0"], IDENTITY)
    assert "/" not in stem and ":" not in stem and not stem.startswith(".") and len(stem) < 150


def test_without_resume_earlier_samples_are_forgotten(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 2))
    with opened(tmp_path, resume=False) as journal:
        assert journal.missing("T/0", 2) == [0, 1]
        journal.append(records("T/0", 1))
    with opened(tmp_path) as journal:
        assert journal.missing("T/0", 3) == [1, 2]


def test_second_writer_in_another_process_is_refused_in_one_line(tmp_path):
    code = (
        "import sys, pathlib; from dylo_moe.samples import SampleJournal\n"
        "from dylo_moe.errors import SampleFileError\n"
        "try: SampleJournal(pathlib.Path(sys.argv[1]), sys.argv[2], {}).__enter__()\n"
        "except SampleFileError as error: print(error)\n"
    )
    with opened(tmp_path) as journal:
        command = [sys.executable, "-c", code, str(tmp_path), journal.path.stem]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert "another process is writing" in said and said.count("\n") == 1
        journal.append(records("T/0", 1))
    with opened(tmp_path) as journal:
        assert journal.missing("T/0", 3) == [1, 2]


def test_samples_of_a_task_may_come_in_any_order_and_are_exported_in_that_of_their_index(tmp_path):
    with opened(tmp_path) as journal:
        journal.append([*records("T/0", 1, first=2), *records("T/1", 1, first=1), *records("T/0", 1)])
        assert journal.missing("T/0", 4) == [1, 3]
    with opened(tmp_path) as journal:
        journal.append([*records("T/1", 1), *records("T/0", 1, first=1)])
        path = journal.export(["T/0", "T/1"], 3, VERSIONS)
    assert rows(path) == [(r.task_id, r.solution) for r in records("T/0", 3) + records("T/1", 2)]


def test_sample_that_is_there_already_is_refused_and_nothing_is_written(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 2))
        before = journal.path.read_bytes()
        for again in (records("T/0", 1, first=1), records("T/1", 1) * 2, records("T/0", 3)):
            with pytest.raises(SampleFileError, match="sample . of T/. for the second time"):
                journal.append(again)
        assert journal.path.read_bytes() == before
        journal.append(records("T/1", 1))


def test_sample_twice_in_the_journal_is_refused(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/0", 2))
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(SampleFileError, match="sample 1 of T/0 for the second time"):
        opened(tmp_path).__enter__()


def test_samples_behind_a_gap_are_not_exported(tmp_path):
    with opened(tmp_path) as journal:
        journal.append([*records("T/0", 1), *records("T/0", 1, first=2), *records("T/1", 1, first=1)])
        assert rows(journal.export(["T/0", "T/1"], 3, VERSIONS)) == [("T/0", records("T/0", 1)[0].solution)]


def test_gap_in_a_chosen_task_is_refused(tmp_path):
    with opened(tmp_path) as journal:
        journal.append([*records("T/0", 3), *records("T/1", 1), *records("T/1", 1, first=2)])
        with pytest.raises(SampleFileError, match="sample 1 of T/1 is missing"):
            journal.export(["T/0", "T/1"], 3, VERSIONS, chosen=["T/0", "T/1"])
        assert not journal.jsonl.exists()
        journal.export(["T/0", "T/1"], 3, VERSIONS, chosen=["T/0"])


def test_whole_run_and_its_shards_have_files_of_their_own(tmp_path):
    with opened(tmp_path) as whole, opened(tmp_path, shard=(0, 2)) as first, opened(tmp_path, shard=(1, 2)) as second:
        assert len({whole.path, first.path, second.path}) == 3
        assert second.path.name == whole.path.stem + ".shard-2-of-2.journal"
        second.append(records("T/1", 1))
        assert second.export(["T/0", "T/1"], 1, VERSIONS, chosen=["T/0", "T/1"]).name == second.path.stem + ".jsonl"
    second.path.rename(first.path)
    with pytest.raises(SampleFileError, match="another run"):
        opened(tmp_path, shard=(0, 2)).__enter__()


def test_exported_files_hold_the_asked_number_in_task_order(tmp_path):
    with opened(tmp_path) as journal:
        journal.append(records("T/9", 2))
        journal.append(records("T/1", 3))
        path = journal.export(["T/1", "T/5", "T/9"], 2, VERSIONS)
    expected = [(r.task_id, r.solution) for r in records("T/1", 2) + records("T/9", 2)]
    assert rows(path) == expected
    assert [task for task, _ in rows(journal.raw_jsonl)] == ["T/1", "T/1", "T/9", "T/9"]
    manifest = json.loads(journal.manifest.read_text())
    assert manifest["identity"] == IDENTITY and manifest["versions"] == VERSIONS and manifest["notes"] == []


def test_replaced_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    place = tmp_path / "file"
    write_atomically(place, b"old")
    write_atomically(place, b"new")
    assert place.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_are_on_the_disk_before_the_file_takes_its_name(tmp_path, monkeypatch):
    flushed = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_size), flush(file)))
    write_atomically(tmp_path / "file", b"new")
    assert flushed[0] == 3 and len(flushed) == 2  # the file, then its directory


def test_what_killed_processes_left_is_removed(tmp_path):
    with opened(tmp_path) as journal:
        pass
    for path in (journal.path, journal.jsonl):
        path.with_name(f".{path.name}.123.tmp").write_bytes(b"half")
    other = tmp_path / ".other.jsonl.123.tmp"
    other.write_bytes(b"half")
    with opened(tmp_path):
        assert [path.name for path in tmp_path.glob(".*.tmp")] == [other.name]


def test_file_that_cannot_be_replaced_keeps_its_content(tmp_path):
    place = tmp_path / "directory"
    (place / "content").mkdir(parents=True)
    with pytest.raises(OSError, match=str(place)):
        write_atomically(place, b"new")
    assert os.listdir(tmp_path) == ["directory"]


def test_sanitizer_keeps_the_entry_point_and_survives_what_it_cannot_read():
    with Sanitizer(seconds=4) as sanitizer:
        assert sanitizer("def f():\n    return 1\n\nprint(2)\n", "f") == ("def f():\n    return 1", "")
        assert sanitizer("def f():\n    return '\ud800'\n", "f") == (
            "def f():\n    return '\ud800'\n",
            "not sanitized: the sanitizer failed",
        )
        long = "\n".join(f"x{i} = [{i}," for i in range(600))
        assert sanitizer(long, "f") == (long, "not sanitized: the sanitizer took more than 4 s")
        assert sanitizer("def f():\n    return 1\n\nprint(2)\n", "f") == ("def f():\n    return 1", "")
