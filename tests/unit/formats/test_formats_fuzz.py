"""Whatever happens to a file: it reads, or it is refused in one line, in time. Never another exception, never a write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dylo_moe.errors import CheckpointError
from dylo_moe.formats import Checkpoint, check_experts_fit_base, detect_model_format, read_checkpoint
from tests.unit.formats import written

# Reading one of these takes 5 ms; a hang or a blow-up takes longer than any deadline.
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")), deadline=5_000, suppress_health_check=[HealthCheck.too_slow]
)
SEEDS = {"native": written.native, "separated": written.separated, "lora": written.write_adapter, "base": written.base}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """name -> a directory that reads."""
    root = tmp_path_factory.mktemp("seeds")
    made = {name: write(root / name) for name, write in SEEDS.items()}
    for path in made.values():
        read_checkpoint(path)
    return made


def outcome(path):
    """ "read" or "refused"; every other end is a failure of the test."""
    before = sorted((entry, entry.lstat().st_mtime_ns) for entry in path.rglob("*"))
    try:
        detect_model_format(path)
        result = "read" if isinstance(read_checkpoint(path), Checkpoint) else "nothing"
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) <= 600
        assert str(error).isprintable()
        result = "refused"
    assert sorted((entry, entry.lstat().st_mtime_ns) for entry in path.rglob("*")) == before
    return result


def damaged(seed, copy, name, data):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(seed, copy)
    (copy / name).write_bytes(data)
    return copy


def files_of(path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())


@pytest.mark.parametrize("name", SEEDS)
@FUZZ
@given(data=st.data())
def test_damaged_bytes_read_or_are_refused(seeds, tmp_path_factory, name, data):
    seed = seeds[name]
    file = data.draw(st.sampled_from(files_of(seed)))
    content = (seed / file).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 16))
    new = data.draw(
        st.sampled_from(["flip", "cut", "double", "insert", "remove"]).flatmap(
            lambda kind: st.just(_damage(content, kind, place, length))
        )
    )
    copy = tmp_path_factory.getbasetemp() / f"copy-{name}"
    assert outcome(damaged(seed, copy, file, new)) in ("read", "refused")


def _damage(content, kind, place, length):
    start, end = content[:place], content[place:]
    return {
        "flip": start + bytes([content[place] ^ (1 << length % 8)]) + content[place + 1 :],
        "cut": start,
        "double": start + content[place : place + length] + end,
        "insert": start + bytes(length) + end,
        "remove": start + content[place + length :],
    }[kind]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -1, 0, "..", "/etc/passwd", "LORA", "(.|.)*[A-Z]", "\0", "\ud800", "x" * 1000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", SEEDS)
@FUZZ
@given(data=st.data())
def test_replaced_json_field_reads_or_is_refused(seeds, tmp_path_factory, name, data):
    seed = seeds[name]
    file = data.draw(st.sampled_from([each for each in files_of(seed) if each.endswith(".json")]))
    content = json.loads((seed / file).read_text())
    place = data.draw(st.sampled_from(sorted(_places(content), key=str)))
    _put(content, place, data.draw(JSON))
    copy = tmp_path_factory.getbasetemp() / f"json-{name}"
    assert outcome(damaged(seed, copy, file, json.dumps(content).encode())) in ("read", "refused")


OPTIONAL_FIELDS = [
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "use_rslora",
    "init_lora_weights",
    "bias",
    "modules_to_save",
    "exclude_modules",
    "_dylora_lora_alpha",
    "_dylora_num_experts",
    "adapter_configs",
    "quantization_config",
    "dtype",
    "head_dim",
]


@pytest.mark.parametrize("name", SEEDS)
@FUZZ
@given(data=st.data())
def test_added_json_field_reads_or_is_refused(seeds, tmp_path_factory, name, data):
    seed = seeds[name]
    file = data.draw(st.sampled_from([each for each in files_of(seed) if each.endswith(".json")]))
    content = json.loads((seed / file).read_text())
    content[data.draw(st.sampled_from(OPTIONAL_FIELDS))] = data.draw(JSON)
    copy = tmp_path_factory.getbasetemp() / f"added-{name}"
    assert outcome(damaged(seed, copy, file, json.dumps(content).encode())) in ("read", "refused")


@FUZZ
@given(data=st.data())
def test_base_with_a_replaced_field_fits_or_is_refused(seeds, tmp_path_factory, data):
    seed, experts = seeds["base"], read_checkpoint(seeds["native"]).experts
    content = json.loads((seed / "config.json").read_text())
    place = data.draw(st.sampled_from(sorted(_places(content), key=str)))
    _put(content, place, data.draw(JSON))
    copy = damaged(seed, tmp_path_factory.getbasetemp() / "fit", "config.json", json.dumps(content).encode())
    try:
        check_experts_fit_base(copy, experts)
    except CheckpointError as error:
        assert "\n" not in str(error)


def _places(value, path=()):
    """Paths of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *_places(inner, (*path, key))]]


def _put(value, place, new):
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def test_fuzzing_reaches_both_outcomes(seeds, tmp_path):
    file = Path("experts/expert_0/adapter_model.safetensors")
    content = (seeds["native"] / file).read_bytes()
    last = bytes([content[-1] ^ 1])
    assert outcome(damaged(seeds["native"], tmp_path / "a", file, content[:-1] + last)) == "read"
    assert outcome(damaged(seeds["native"], tmp_path / "b", file, content[:-1])) == "refused"
