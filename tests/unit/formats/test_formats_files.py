"""The three kinds of file, each read by its own bounded reader."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe.errors import CheckpointError, DtypeUnsupported, InvalidField, NonFiniteTensor, UnreadableFile
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.jsonfile import parse_json
from dylo_moe.formats.patterns import MatchBudget, fullmatch, natural_sorted, pattern_value
from dylo_moe.formats.pickle_file import convert_pickles, run_child
from dylo_moe.formats.safetensors_file import MAX_TENSORS, load_tensors

FILE = Path("x.json")


def test_json_values_are_those_of_the_standard_parser():
    data = b'{"a": [1, -2.5, true, null, "\\u00e9"], "b": {"c": 18446744073709551615}}'
    assert parse_json(data, FILE) == json.loads(data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_that_are_not_finite_are_named(number):
    for text in (f'{{"a": {{"b": {number}}}}}', f'{{"b": [[1, {number}]]}}'):
        with pytest.raises(NonFiniteTensor, match=": b:"):
            parse_json(text.encode(), FILE)


def test_json_duplicate_is_found_at_any_depth():
    with pytest.raises(InvalidField, match="twice"):
        parse_json(b'{"a": [{"b": 1, "b": 1}]}', FILE)


def safetensors(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = [
    ("hole", {"a": entry(offsets=(4, 8))}, 8, UnreadableFile),
    ("overlap", {"a": entry(), "b": entry()}, 4, UnreadableFile),
    ("too long", {"a": entry()}, 8, UnreadableFile),
    ("too short", {"a": entry()}, 3, UnreadableFile),
    ("size", {"a": entry(shape=(2,))}, 4, UnreadableFile),
    ("negative", {"a": entry(shape=(-1,), offsets=(4, 0))}, 4, UnreadableFile),
    ("huge", {"a": entry(shape=(2**62, 2**62))}, 4, UnreadableFile),
    ("many sizes", {"a": entry(shape=(1,) * 100)}, 4, UnreadableFile),
    ("true", {"a": entry(shape=(True,))}, 4, UnreadableFile),
    ("text", {"a": "F32"}, 4, UnreadableFile),
    ("unknown field", {"a": {**entry(), "b": 1}}, 4, UnreadableFile),
    ("dtype", {"a": entry(dtype="C64")}, 4, DtypeUnsupported),
    ("dtype list", {"a": entry(dtype=[])}, 4, DtypeUnsupported),
    ("metadata", {"__metadata__": 1}, 0, UnreadableFile),
    ("tensors", {str(number): 1 for number in range(MAX_TENSORS + 1)}, 0, UnreadableFile),
    ("not JSON", b"{", 0, UnreadableFile),
    ("duplicate", b'{"a": 1, "a": 1}', 0, InvalidField),
]


@pytest.mark.parametrize(("header", "size", "kind"), [case[1:] for case in BAD_HEADERS], ids=[case[0] for case in BAD_HEADERS])
def test_bad_header_is_refused(tmp_path, header, size, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"a": entry()}, bytes(4)))
    load_tensors(path, path)
    path.write_bytes(safetensors(header, bytes(size)))
    with pytest.raises(kind):
        load_tensors(path, path)


def test_tensors_equal_the_standard_reader_and_own_their_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    save_file({**tensors, "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}, path, metadata={"format": "pt"})
    ours, digest = load_tensors(path, path)
    theirs = load_file(path)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"changed")  # a mapped file would change the tensors
    assert ours["scalar"].item() == 1.5
    assert all(torch.equal(ours[key], tensors[key]) for key in tensors)


def test_misaligned_data_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"byte": entry("U8", (1,), (0, 1)), "number": entry("F64", (1,), (1, 9))}
    path.write_bytes(safetensors(header, b"\x07" + struct.pack("<d", 2.5)))
    tensors, _ = load_tensors(path, path)
    assert (tensors["byte"].item(), tensors["number"].item()) == (7, 2.5)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BOMB = torch.zeros(1).expand(2**34)  # one number stored, 64 GB when written out
REFUSED = {
    "code": lambda place: _saved({"a": Payload(place / "made")}),
    "bare code": lambda place: pickle.dumps(Payload(place / "made")),
    "expanded": lambda place: _saved({"a": BOMB}),
    "nested": lambda place: b"\x80\x02" + b"]" * 100_000 + b".",
    "not a dict": lambda place: _saved([torch.ones(1)]),
    "number keys": lambda place: _saved({1: torch.ones(1)}),
    "other values": lambda place: _saved({"a": {"b"}}),
    "sparse": lambda place: _saved({"a": torch.ones(2, 2).to_sparse()}),
    "complex": lambda place: _saved({"a": torch.ones(1, dtype=torch.complex64)}),
    "empty": lambda place: b"",
    "text": lambda place: b"hello",
    "cut": lambda place: _saved({"a": torch.ones(100)})[:-50],
}


def test_refused_pickle_is_one_line_that_names_it(tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"a": {"b": torch.ones(2), "c": 3}}, good)
    bad.write_bytes(REFUSED["code"](tmp_path))
    with pytest.raises(UnreadableFile, match="bad.pt.*without running code") as caught:
        convert_pickles({good: good, bad: bad})
    assert "\n" not in str(caught.value)


def test_every_refused_pickle_has_a_reason_and_none_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    files, scratch = [], tmp_path / "scratch"
    scratch.mkdir()
    for number, make in enumerate([*REFUSED.values(), lambda place: _saved({"a": torch.ones(1)})]):
        files.append(tmp_path / f"{number}.pt")
        files[-1].write_bytes(make(tmp_path))
    run_child(files, scratch, 60)
    answers = [json.loads((scratch / f"{number}.json").read_text()) for number in range(len(files))]
    for name, answer in zip(REFUSED, answers[:-1], strict=True):
        assert "refused" in answer, name
    assert "tree" in answers[-1]
    assert not (tmp_path / "made").exists()


def test_damaged_pickles_always_get_an_answer(tmp_path):
    content = _saved({"state": {"a": torch.ones(8), "b": torch.zeros(2, 2)}, "top_k": 1})
    generator, scratch, files = torch.Generator().manual_seed(1), tmp_path / "scratch", []
    scratch.mkdir()
    for number in range(60):
        place, bit = (int(torch.randint(limit, (), generator=generator)) for limit in (len(content), 8))
        files.append(tmp_path / f"{number}.pt")
        flipped = bytes([content[place] ^ 1 << bit])
        files[-1].write_bytes(content[:place] if number % 4 == 0 else content[:place] + flipped + content[place + 1 :])
    run_child(files, scratch, 60)
    answers = [json.loads((scratch / f"{number}.json").read_text()) for number in range(len(files))]
    assert {bool(answer.get("refused")) for answer in answers} == {True, False}


def test_pickle_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(2**27, dtype=torch.uint8)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(UnreadableFile, match="bomb.pt"):
        convert_pickles({bomb: bomb})


def test_pickled_tree_equals_what_was_saved(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    tree = {"state": {"a": shared, "t": shared.T, "h": torch.ones(2, dtype=torch.bfloat16)}, "k": 2, "l": [1.5, None, "x"]}
    path = tmp_path / "a.pt"
    torch.save(tree, path)
    files = CheckpointFiles(tmp_path)
    read = files.pickle(path)
    assert all(torch.equal(read["state"][key], value) for key, value in tree["state"].items())
    assert {key: read[key] for key in "kl"} == {key: tree[key] for key in "kl"}
    assert files.hashes == {"a.pt": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_patterns_match_as_pefts_expression_does():
    patterns = ("q_proj", r"layers\.1\.v_proj", "layers.1.v_proj", r".*\.k_proj", "a|o_proj", "m.k_proj", "(x|b).a", "l.yers.1")
    modules = (
        "q_proj",
        "x.q_proj",
        "xq_proj",
        "m.layers.1.v_proj",
        "m.layers.11.v_proj",
        "m.k_proj",
        "m.o_proj",
        "b.a",
        "mxk_proj",
    )
    for pattern in patterns:
        for module in (*modules, "layersx1.v_proj", "layers.1"):
            wanted = re.match(rf"(.*\.)?({pattern})$", module) is not None  # peft.utils.other.get_pattern_key
            found = pattern_value({pattern: True}, module, False, file=FILE, field="rank_pattern", budget=MatchBudget())
            assert found == wanted, (pattern, module)


def test_hostile_pattern_is_stopped():
    with pytest.raises(CheckpointError, match="takes more than"):
        fullmatch("(.|.)*[A-Z]", "model.layers.0.self_attn.q_proj", file=FILE, field="target_modules", budget=MatchBudget())


def test_many_slow_patterns_share_one_budget():
    patterns = {f"(.|.){{{number}}}[A-Z]": 1 for number in range(10, 10_000)}
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="rank_pattern"):
        for _ in range(1_000):
            pattern_value(patterns, "model.layers.0.q_proj", 0, file=FILE, field="rank_pattern", budget=MatchBudget(0.5))
    assert time.monotonic() - started < 5


def test_names_sort_by_their_numbers():
    names = ["expert_10", "b", "expert_9", "a10b2", "a10b10", "expert_1", "a9"]
    assert natural_sorted(names) == ["a9", "a10b2", "a10b10", "b", "expert_1", "expert_9", "expert_10"]
