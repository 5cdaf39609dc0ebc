"""DyLoRA-MoE's full state and its merged models in shards; impossible numbers refused before a weight is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dylo_moe import DyLoRA_MoE, detect_model_format, load_checkpoint
from dylo_moe.errors import CheckpointError, ExpertMissing, ForeignTensor, InvalidField, ShapeMismatch
from dylo_moe.formats.dylora_full import read_full_state
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from fixtures.layouts import BY_NAME, write_layout
from fixtures.shards import shard
from harness.specimens import write_base
from tests.unit.formats.gated_case import IDS, assert_refused, configure, edit_tensors

FULL = (("D2", False), ("D3c", False), ("D3b", True))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "llama", "llama")


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def load(name: str, path: Path, base: Path) -> DyLoRA_MoE:
    layout = BY_NAME[name]
    given = {} if layout.records_base else {"base_model": str(base)}
    return load_checkpoint(path, **given, **layout.options)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> torch.Tensor:
    """Logits of the full state in one file; every layout holds the same mixture."""
    with torch.no_grad():
        return load("D2", write_layout(tmp_path_factory.mktemp("whole"), base, "D2"), base)(IDS).logits


@pytest.mark.parametrize(("name", "pickled"), FULL)
def test_full_state_in_shards_equals_the_one_file(base, whole, tmp_path, name, pickled):
    path = shard(write_layout(tmp_path / "shards", base, name), 3, pickled=pickled)
    before = digests(tmp_path / "shards")
    assert detect_model_format(path) == "dylora-full-state"
    model = load(name, path, base)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole)
    assert digests(tmp_path / "shards") == before


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_full_state_in_shards_beside_a_plain_config_is_no_merged_model(base, whole, tmp_path, pickled):
    path = shard(write_layout(tmp_path, base, "D2"), pickled=pickled)
    (path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert detect_model_format(path) == "dylora-full-state"
    if not pickled:
        with torch.no_grad():
            assert torch.equal(load_checkpoint(path, lora_alpha=8)(IDS).logits, whole)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_lost_shard_is_refused_by_its_name(base, tmp_path, pickled):
    path = shard(write_layout(tmp_path, base, "D3b"), pickled=pickled)
    lost = sorted(path.glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load("D3b", path, base)


def test_pickled_shard_without_a_tensor_of_the_index_is_refused(base, tmp_path):
    path = shard(write_layout(tmp_path, base, "D3b"), pickled=True)
    first = sorted(path.glob("*-of-*"))[0]
    edit_tensors(first, lambda tensors: tensors.pop(next(iter(tensors))))
    assert_refused(path, InvalidField, first.name, "index.json")


def test_pickled_shard_with_a_tensor_that_the_index_does_not_know_is_refused(base, tmp_path):
    path = shard(write_layout(tmp_path, base, "D3b"), pickled=True)
    first = sorted(path.glob("*-of-*"))[0]
    edit_tensors(first, lambda tensors: tensors.update({"foundation_model.x": torch.ones(2)}))
    assert_refused(path, ForeignTensor, "foundation_model.x", "no shard")


def test_expert_that_no_shard_holds_is_refused(base, tmp_path):
    path = write_layout(tmp_path, base, "D3b")
    edit_tensors(path / "model.safetensors", lambda tensors: [tensors.pop(key) for key in list(tensors) if "expert_1." in key])
    assert_refused(shard(path), ExpertMissing, "expert_1")


NUMBERS = [
    {"hidden_size": 10**12},
    {"num_hidden_layers": -1},
    {"vocab_size": "many"},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"dtype": "int8"},
]


@pytest.mark.parametrize("fields", NUMBERS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "dylora-moe"])
def test_impossible_numbers_are_refused_before_a_weight_is_read(base, tmp_path, fields, model_type):
    path = write_layout(tmp_path, base, "D3c")
    configure(path / "config.json", model_type=model_type, **fields)
    files = CheckpointFiles(path)
    with pytest.raises(InvalidField) as caught:
        read_full_state(files, ReadOptions())
    assert caught.value.file.name == "config.json"
    assert caught.value.field == next(iter(fields))
    assert list(files.hashes) == ["config.json"]


@pytest.mark.parametrize(
    ("fields", "field"), [({"vocab_size": 9}, "model.embed_tokens.weight"), ({"num_hidden_layers": 5}, "num_hidden_layers")]
)
def test_numbers_that_contradict_the_header_are_refused_before_a_weight_is_read(base, tmp_path, fields, field):
    path = write_layout(tmp_path, base, "D3c")
    configure(path / "config.json", **fields)
    files = CheckpointFiles(path)
    with pytest.raises(ShapeMismatch) as caught:
        read_full_state(files, ReadOptions())
    assert caught.value.field == field
    assert "model.safetensors" not in files.hashes


MERGED = [("merged", False), ("dylora-merged", False), ("dylora-merged", True), ("dylora-rewritten", False)]


@pytest.mark.parametrize(("name", "pickled"), MERGED)
def test_merged_model_in_shards_is_a_plain_model_and_no_file_changes(base, tmp_path, name, pickled):
    whole = load_checkpoint(write_layout(tmp_path / "whole", base, name))
    path = shard(write_layout(tmp_path / "shards", base, name), 2, pickled=pickled)
    before = digests(path)
    assert detect_model_format(path) == "merged"
    model = load_checkpoint(path)
    assert isinstance(model, PreTrainedModel)
    assert model.config.model_type == "llama"
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, whole(IDS).logits)
        assert not torch.allclose(logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
    assert digests(path) == before


def test_marked_merged_model_in_one_pickle_is_told_from_a_full_state(base, tmp_path):
    path = write_layout(tmp_path, base, "dylora-merged")
    single = shard(path, 1, pickled=True)
    (index,) = path.glob("*.index.json")
    (part,) = path.glob("pytorch_model-*.bin")
    part.rename(path / "pytorch_model.bin")
    index.unlink()
    assert json.loads((single / "config.json").read_text())["model_type"] == "dylora-moe"
    assert detect_model_format(path) == "merged"
