"""One defect per case, planted into a checkpoint that reads without it; refused by the class and by the name of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe import errors
from dylo_moe.formats import combined_hash, read_checkpoint
from tests.unit.formats import written

ADAPTER = Path("experts/expert_0/adapter_model.safetensors")
ADAPTER_CONFIG = Path("experts/expert_0/adapter_config.json")
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


TENSOR_DEFECTS = [
    ("no tensors", lambda tensors: tensors.clear(), errors.ExpertEmpty, "0 tensors"),
    ("base weight", put("model.embed_tokens.weight", torch.ones(16, 8)), errors.ForeignTensor, "embed_tokens"),
    ("base layer", put(f"{FIRST}.base_layer.weight", torch.ones(8, 8)), errors.ForeignTensor, "base_layer"),
    ("other expert", put(f"{FIRST}.lora_A.expert_10.weight", torch.ones(4, 8)), errors.ForeignTensor, "expert_10"),
    ("magnitude", put(f"{FIRST}.lora_magnitude_vector", torch.ones(8)), errors.ForeignTensor, "lora_magnitude_vector"),
    ("half a pair", drop(f"{FIRST}.lora_B.weight"), errors.IncompletePair, "lora_B"),
    ("other half", drop(f"{FIRST}.lora_A.weight"), errors.IncompletePair, "lora_A"),
    ("rank of partner", put(f"{FIRST}.lora_B.weight", torch.ones(8, 3)), errors.ShapeMismatch, "lora_B"),
    ("three sizes", put(f"{FIRST}.lora_A.weight", torch.ones(4, 8, 1)), errors.ShapeMismatch, "lora_A"),
    ("rank 0", put(f"{FIRST}.lora_A.weight", torch.ones(0, 8)), errors.ShapeMismatch, "lora_A"),
    ("NaN", put(f"{FIRST}.lora_A.weight", torch.full((4, 8), torch.nan)), errors.NonFiniteTensor, "lora_A"),
    ("infinity", put(f"{FIRST}.lora_B.weight", torch.full((8, 4), torch.inf)), errors.NonFiniteTensor, "lora_B"),
    ("integers", put(f"{FIRST}.lora_A.weight", torch.ones(4, 8, dtype=torch.int8)), errors.DtypeUnsupported, "int8"),
    ("untargeted", put(f"{FIRST[:-6]}k_proj.lora_A.weight", torch.ones(4, 8)), errors.IncompletePair, "k_proj"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in TENSOR_DEFECTS], ids=[c[0] for c in TENSOR_DEFECTS])
def test_defective_tensor_is_refused_by_name(tmp_path, change, kind, word):
    written.native(tmp_path)
    read_checkpoint(tmp_path)
    edit(tmp_path / ADAPTER, change)
    assert_refused(tmp_path, kind, word)


CONFIG_DEFECTS = [
    ("rank differs", {"r": 8}, errors.ShapeMismatch, "rank 8"),
    ("rank zero", {"r": 0}, errors.InvalidField, " r:"),
    ("rank negative", {"r": -4}, errors.InvalidField, " r:"),
    ("rank text", {"r": "4"}, errors.InvalidField, " r:"),
    ("rank fraction", {"r": 4.0}, errors.InvalidField, " r:"),
    ("rank true", {"r": True}, errors.InvalidField, " r:"),
    ("rank huge", {"r": 10**12}, errors.InvalidField, " r:"),
    ("rank absent", {"r": None}, errors.InvalidField, " r:"),
    ("alpha NaN", {"lora_alpha": float("nan")}, errors.NonFiniteTensor, "lora_alpha"),
    ("alpha infinite", {"lora_alpha": float("inf")}, errors.NonFiniteTensor, "lora_alpha"),
    ("alpha huge", {"lora_alpha": 1e9}, errors.InvalidField, "lora_alpha"),
    ("alpha text", {"lora_alpha": "8"}, errors.InvalidField, "lora_alpha"),
    ("alpha pattern", {"alpha_pattern": {"q_proj": None}}, errors.InvalidField, "alpha_pattern"),
    ("flag text", {"use_rslora": "yes"}, errors.InvalidField, "use_rslora"),
    ("targets too few", {"target_modules": ["q_proj"]}, errors.InvalidField, "v_proj"),
    ("targets too many", {"target_modules": ["q_proj", "v_proj", "o_proj"]}, errors.InvalidField, "o_proj"),
    ("targets absent", {"target_modules": None}, errors.InvalidField, "target_modules"),
    ("targets pattern", {"target_modules": ".*k_proj"}, errors.InvalidField, "target_modules"),
    ("targets hostile", {"target_modules": "(.|.)*[A-Z]"}, errors.InvalidField, "takes more"),
    ("targets long", {"target_modules": "a|" * 5000}, errors.InvalidField, "target_modules"),
    ("targets broken", {"target_modules": "("}, errors.InvalidField, "target_modules"),
    ("rank pattern hostile", {"rank_pattern": {"(.|.)*[A-Z]": 4}}, errors.InvalidField, "takes more"),
    ("other layers", {"layers_to_transform": [0]}, errors.InvalidField, "layers.1"),
    ("DoRA", {"use_dora": True}, errors.InvalidField, "use_dora"),
    ("saved modules", {"modules_to_save": ["lm_head"]}, errors.InvalidField, "modules_to_save"),
    ("PiSSA", {"init_lora_weights": "pissa_niter_4"}, errors.InvalidField, "init_lora_weights"),
    ("replication", {"layer_replication": [[0, 2], [0, 2]]}, errors.InvalidField, "layer_replication"),
    ("arrow", {"arrow_config": {"top_k": 2}}, errors.InvalidField, "arrow_config"),
    ("bias", {"bias": "some"}, errors.InvalidField, "bias"),
    ("classifier", {"task_type": "SEQ_CLS"}, errors.InvalidField, "task_type"),
    ("other type", {"peft_type": "LOHA"}, errors.InvalidField, "peft_type"),
    ("other base", {"base_model_name_or_path": "another"}, errors.InvalidField, "another"),
    ("scaling", {"lora_alpha": 16}, errors.InvalidField, "scaling"),
]


@pytest.mark.parametrize(
    ("fields", "kind", "word"), [case[1:] for case in CONFIG_DEFECTS], ids=[case[0] for case in CONFIG_DEFECTS]
)
def test_defective_adapter_configuration_is_refused_by_field(tmp_path, fields, kind, word):
    written.native(tmp_path)
    read_checkpoint(tmp_path)
    configure(tmp_path / ADAPTER_CONFIG, **fields)
    assert_refused(tmp_path, kind, word)


def _router(**fields):
    return {"router": {**written.moe_config()["router"], **fields}}


def _experts(*names):
    return {"experts": [{"name": name} for name in names], "num_experts": len(names)}


MOE_DEFECTS = [
    ("version", {"format_version": 2}, errors.InvalidField, "format_version"),
    ("format", {"format": "other"}, errors.InvalidField, "format"),
    ("count", {"num_experts": 3}, errors.ExpertCountMismatch, "num_experts"),
    ("count text", {"num_experts": "2"}, errors.InvalidField, "num_experts"),
    ("one too few", _experts("expert_0"), errors.ExpertCountMismatch, "expert_1"),
    ("one too many", _experts("expert_0", "expert_1", "expert_2"), errors.ExpertMissing, "expert_2"),
    ("twice", _experts("expert_0", "expert_0"), errors.InvalidField, "twice"),
    ("dot", _experts("expert_0", "expert.1"), errors.InvalidField, "expert.1"),
    ("parent", _experts("expert_0", ".."), errors.InvalidField, "'..'"),
    ("slash", _experts("expert_0", "a/b"), errors.InvalidField, "a/b"),
    ("empty name", _experts("expert_0", ""), errors.InvalidField, "name"),
    ("reserved name", _experts("expert_0", "keys"), errors.InvalidField, "keys"),
    ("base", {"base_model_name_or_path": "another"}, errors.InvalidField, "another"),
    ("top_k", _router(top_k=3), errors.InvalidField, "top_k"),
    ("top_k zero", _router(top_k=0), errors.InvalidField, "top_k"),
    ("temperature", _router(temperature=0), errors.InvalidField, "temperature"),
    ("temperature NaN", _router(temperature=float("nan")), errors.NonFiniteTensor, "temperature"),
    ("features", _router(features="none"), errors.InvalidField, "features"),
    ("hidden size", _router(hidden_size=9), errors.ShapeMismatch, "gate.weight"),
    ("router null", {"router": None}, errors.InvalidField, "router"),
    ("loss type", {"load_balance": {"load_balance_loss_type": "x"}}, errors.InvalidField, "load_balance_loss_type"),
]


@pytest.mark.parametrize(("fields", "kind", "word"), [case[1:] for case in MOE_DEFECTS], ids=[case[0] for case in MOE_DEFECTS])
def test_defective_moe_config_is_refused_by_field(tmp_path, fields, kind, word):
    written.native(tmp_path)
    read_checkpoint(tmp_path)
    configure(tmp_path / "moe_config.json", **fields)
    assert_refused(tmp_path, kind, word)


GATE_DEFECTS = [
    ("no gate", lambda tensors: tensors.pop("gate.weight"), errors.GateMissing, "gate.weight"),
    ("more experts", put("gate.weight", torch.ones(3, 8)), errors.ShapeMismatch, "gate.bias"),
    ("bias", put("gate.bias", torch.ones(3)), errors.ShapeMismatch, "gate.bias"),
    ("foreign", put("gate.norm", torch.ones(3)), errors.ForeignTensor, "gate.norm"),
    ("NaN", put("gate.bias", torch.full((2,), torch.nan)), errors.NonFiniteTensor, "gate.bias"),
    ("integers", put("gate.weight", torch.ones(2, 8, dtype=torch.int64)), errors.DtypeUnsupported, "gate.weight"),
    ("vector", put("gate.weight", torch.ones(16)), errors.ShapeMismatch, "gate.weight"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in GATE_DEFECTS], ids=[case[0] for case in GATE_DEFECTS])
def test_defective_gate_is_refused_by_tensor(tmp_path, change, kind, word):
    written.native(tmp_path)
    edit(tmp_path / "router.safetensors", change)
    assert_refused(tmp_path, kind, word)


def test_gate_of_another_number_of_experts_is_a_count_mismatch(tmp_path):
    written.separated(tmp_path)
    save_file(written.gate(3), tmp_path / "router.safetensors")
    assert_refused(tmp_path, errors.ExpertCountMismatch, "3 rows for 2 experts")


def test_transposed_gate_names_both_shapes(tmp_path):
    written.separated(tmp_path)
    gate = written.gate()
    save_file({**gate, "gate.weight": gate["gate.weight"].T.contiguous()}, tmp_path / "router.safetensors")
    message = assert_refused(tmp_path, errors.ShapeMismatch, "transposed")
    assert "(8, 2)" in message
    assert "(2, 8)" in message


def test_absent_router_is_named(tmp_path):
    for make in (written.native, written.separated):
        path = make(tmp_path / make.__name__)
        (path / "router.safetensors").unlink()
        assert_refused(path, errors.GateMissing, "gate.weight")


def test_gap_in_separated_experts_names_the_missing_one(tmp_path):
    written.separated(tmp_path, experts=4)
    shutil.rmtree(tmp_path / "peft_adapters" / "expert_2")
    assert_refused(tmp_path, errors.ExpertMissing, "expert_2")


def test_more_separated_experts_than_recorded_is_refused(tmp_path):
    written.separated(tmp_path)
    configure(tmp_path / "config.json", num_experts=1)
    assert_refused(tmp_path, errors.ExpertCountMismatch, "2 experts")


def test_tensors_of_expert_10_in_expert_1_are_foreign(tmp_path):
    written.separated(tmp_path)
    path = tmp_path / "peft_adapters/expert_1/expert_1/adapter_model.safetensors"
    edit(path, lambda tensors: tensors.update(written.pairs(suffix=".expert_10")))
    assert_refused(tmp_path, errors.ForeignTensor, "expert_10")


def test_experts_of_two_sizes_are_refused(tmp_path):
    written.separated(tmp_path)
    path = tmp_path / "peft_adapters/expert_1/expert_1/adapter_model.safetensors"
    edit(path, lambda tensors: tensors.update({f"{FIRST}.lora_A.weight": torch.ones(4, 9)}))
    assert_refused(tmp_path, errors.ShapeMismatch, "expert_1")


def test_full_state_without_gate_or_with_half_an_expert_is_refused(tmp_path):
    state = written.full_state()
    save_file({key: value for key, value in state.items() if "router" not in key}, tmp_path / "model.safetensors")
    assert_refused(tmp_path, errors.GateMissing, "gate.weight", lora_alpha=8)
    module = f"foundation_model.{FIRST}.lora_"
    lacking = {key: value for key, value in state.items() if not (key.startswith(module) and "expert_1" in key)}
    save_file(lacking, tmp_path / "model.safetensors")
    assert_refused(tmp_path, errors.IncompletePair, "expert_1", lora_alpha=8)


FILE_DEFECTS = [
    ("truncated JSON", "moe_config.json", b'{"format": ', errors.UnreadableFile, "JSON"),
    ("not an object", "moe_config.json", b"[1]", errors.UnreadableFile, "list"),
    ("nested", "moe_config.json", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", errors.UnreadableFile, "deep"),
    ("duplicate key", "moe_config.json", b'{"num_experts": 1, "num_experts": 2}', errors.InvalidField, "twice"),
    ("long integer", "moe_config.json", b'{"num_experts": ' + b"9" * 5000 + b"}", errors.InvalidField, "5000"),
    ("not UTF-8", "moe_config.json", b'{"\xff": 1}', errors.UnreadableFile, "UTF-8"),
    ("huge JSON", "moe_config.json", b" " * 5_000_000, errors.UnreadableFile, "bytes"),
    ("empty tensors", ADAPTER, b"", errors.UnreadableFile, "0 bytes"),
    ("header bomb", ADAPTER, struct.pack("<Q", 2**62) + b"{}", errors.UnreadableFile, "header"),
]


@pytest.mark.parametrize(
    ("name", "data", "kind", "word"), [case[1:] for case in FILE_DEFECTS], ids=[case[0] for case in FILE_DEFECTS]
)
def test_damaged_file_is_refused_by_name(tmp_path, name, data, kind, word):
    written.native(tmp_path)
    (tmp_path / name).write_bytes(data)
    message = assert_refused(tmp_path, kind, word)
    assert Path(name).name in message


def test_truncated_tensors_are_refused(tmp_path):
    written.native(tmp_path)
    data = (tmp_path / ADAPTER).read_bytes()
    (tmp_path / ADAPTER).write_bytes(data[:-1])
    assert_refused(tmp_path, errors.UnreadableFile, ADAPTER.name)


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "link out", "broken link", "link loop"])
def test_configuration_that_is_not_a_file_inside_is_refused(tmp_path, kind):
    path = written.native(tmp_path / "checkpoint") / "moe_config.json"
    path.rename(tmp_path / "outside.json")
    make = {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
        "link out": lambda: path.symlink_to(tmp_path / "outside.json"),
        "broken link": lambda: path.symlink_to("nowhere"),
        "link loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    assert_refused(path.parent, errors.MissingFile, "moe_config.json")


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    written.write_adapter(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert read_checkpoint(snapshot).num_experts == 1


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "", "absent.safetensors"])
def test_index_that_names_no_file_beside_it_is_refused(tmp_path, target):
    save_file(written.full_state(), tmp_path / "a.safetensors")
    placed = dict.fromkeys(written.full_state(), "a.safetensors")
    index = written.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": placed})
    read_checkpoint(tmp_path, lora_alpha=8)
    placed["router.gate.weight"] = target
    written.write_json(index, {"weight_map": placed})
    kind = errors.MissingFile if target == "absent.safetensors" else errors.CheckpointError
    assert_refused(tmp_path, kind, "", lora_alpha=8)


def test_pinned_hashes_are_compared(tmp_path):
    path = written.native(tmp_path)
    checkpoint = read_checkpoint(path)
    together = combined_hash(checkpoint.hashes)
    assert read_checkpoint(path, expect_hash=together).hashes == read_checkpoint(path, expect_hash=checkpoint.hashes).hashes
    edit(path / ADAPTER, lambda tensors: tensors[f"{FIRST}.lora_A.weight"].add_(1))
    for pinned in (together, checkpoint.hashes):
        assert_refused(path, errors.HashMismatch, "", expect_hash=pinned)
    assert_refused(path, errors.HashMismatch, "other.json", expect_hash={"other.json": "0" * 64})


def assert_refused(path, kind, word, **options):
    with pytest.raises(errors.CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {message}"
    assert word in message
    assert "\n" not in message
    return message
