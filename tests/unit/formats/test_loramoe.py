"""LoRAMoE (Fudan) and HydraLoRA: dense softmax gates, as their authors' PEFT forks write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dylo_moe import errors
from dylo_moe.formats import read_checkpoint
from fixtures.gated import draw, probabilities
from fixtures.loramoe import write_hydralora, write_loramoe
from harness.specimens import write_base
from tests.unit.formats.gated_case import assert_equals_the_equation, assert_refused, configure, drop, drop_all, edit_tensors, put

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATE = "base_model.model.model.layers.1.mlp.up_proj"


def dense(x, adapted, layer):
    return probabilities(x, adapted)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_base(root / family, family) for family in ("llama", "gemma")}


@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "safetensors"])
def test_loramoe_equals_its_equation(bases, tmp_path, pickled):
    mixture = draw(bases["llama"], ("gate_proj", "down_proj", "up_proj"), experts=3)
    path = write_loramoe(tmp_path, mixture, pickled=pickled)
    assert_equals_the_equation(path, "loramoe", mixture, dense)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_hydralora_equals_its_equation(bases, tmp_path, family):
    mixture = draw(bases[family], ("q_proj", "down_proj"), experts=4, alphas=(6,), shared_a=True, seed=3)
    path = write_hydralora(tmp_path, mixture, pickled=False)
    assert_equals_the_equation(path, "hydralora", mixture, dense)


def test_hydralora_keeps_one_tensor_for_the_shared_half(bases, tmp_path):
    mixture = draw(bases["llama"], ("q_proj",), experts=3, shared_a=True)
    checkpoint = read_checkpoint(write_hydralora(tmp_path, mixture))
    first, *others = checkpoint.experts
    for module, pair in first.modules.items():
        assert all(expert.modules[module].lora_A is pair.lora_A for expert in others)


def test_bfloat16_experts_and_gates_are_read(bases, tmp_path):
    path = write_loramoe(tmp_path, draw(bases["llama"], ("up_proj",)), pickled=False)
    edit_tensors(path / WEIGHTS, lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))
    gates = read_checkpoint(path).router.gates
    assert {gate.weight.dtype for gate in gates.values()} == {torch.bfloat16}


TENSOR_DEFECTS = [
    ("no gate on a module", drop(f"{GATE}.lora_route.weight"), errors.GateMissing, "up_proj.lora_route.weight"),
    ("transposed gate", put(f"{GATE}.lora_route.weight", torch.ones(48, 3)), errors.ShapeMismatch, "transposed"),
    ("gate of 2", put(f"{GATE}.lora_route.weight", torch.ones(2, 48)), errors.ExpertCountMismatch, "2 rows"),
    ("gate of ints", put(f"{GATE}.lora_route.weight", torch.ones(3, 48, dtype=torch.int8)), errors.DtypeUnsupported, "route"),
    ("gate NaN", put(f"{GATE}.lora_route.weight", torch.full((3, 48), torch.nan)), errors.NonFiniteTensor, "lora_route"),
    ("expert NaN", put(f"{GATE}.lora_B2.weight", torch.full((80, 4), torch.inf)), errors.NonFiniteTensor, "lora_B2"),
    ("half a pair", drop(f"{GATE}.lora_B1.weight"), errors.IncompletePair, "lora_A1"),
    ("other half", drop(f"{GATE}.lora_A0.weight"), errors.IncompletePair, "lora_B0"),
    ("gap", drop(f"{GATE}.lora_A1.weight", f"{GATE}.lora_B1.weight"), errors.ExpertMissing, "expert 1"),
    ("last gone", drop(f"{GATE}.lora_A2.weight", f"{GATE}.lora_B2.weight"), errors.ExpertCountMismatch, "lora_nums"),
    ("only a gate", drop_all("layers.1.mlp.up_proj.lora_A"), errors.IncompletePair, "up_proj"),
    ("base weight", put("base_model.model.lm_head.weight", torch.ones(4, 4)), errors.ForeignTensor, "lm_head"),
    ("gate bias", put(f"{GATE}.lora_route.bias", torch.ones(3)), errors.ForeignTensor, "lora_route.bias"),
    ("rank", put(f"{GATE}.lora_A1.weight", torch.ones(3, 48)), errors.ShapeMismatch, "lora_B1"),
    ("shared A too", put(f"{GATE}.lora_A.weight", torch.ones(4, 48)), errors.ForeignTensor, "lora_A0"),
    ("huge number", put(f"{GATE}.lora_A99999.weight", torch.ones(4, 48)), errors.InvalidField, "99999"),
    ("nothing", drop_all("lora_"), errors.ExpertEmpty, "0 tensors"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in TENSOR_DEFECTS], ids=[c[0] for c in TENSOR_DEFECTS])
def test_defective_tensor_is_refused_by_name(bases, tmp_path, change, kind, word):
    path = write_loramoe(tmp_path, draw(bases["llama"], ("up_proj",)), pickled=False)
    read_checkpoint(path)
    edit_tensors(path / WEIGHTS, change)
    assert_refused(path, kind, word, str(path))


CONFIG_DEFECTS = [
    ({"lora_nums": 4}, errors.ExpertCountMismatch, "lora_nums"),
    ({"lora_nums": None}, errors.InvalidField, "lora_nums"),
    ({"lora_nums": True}, errors.InvalidField, "lora_nums"),
    ({"r": 8}, errors.ShapeMismatch, "rank 8"),
    ({"r": 0}, errors.InvalidField, " r:"),
    ({"lora_alpha": None}, errors.InvalidField, "lora_alpha"),
    ({"bias": "all"}, errors.InvalidField, "bias"),
    ({"modules_to_save": ["lm_head"]}, errors.InvalidField, "modules_to_save"),
    ({"enable_lora": [True]}, errors.InvalidField, "enable_lora"),
    ({"fan_in_fan_out": True}, errors.InvalidField, "fan_in_fan_out"),
    ({"task_type": "SEQ_CLS"}, errors.InvalidField, "task_type"),
    ({"target_modules": ["up_proj", "q_proj"]}, errors.InvalidField, "target_modules"),
    ({"target_modules": None}, errors.InvalidField, "target_modules"),
]


@pytest.mark.parametrize(("fields", "kind", "word"), CONFIG_DEFECTS, ids=[str(case[0]) for case in CONFIG_DEFECTS])
def test_defective_configuration_is_refused_by_field(bases, tmp_path, fields, kind, word):
    path = write_loramoe(tmp_path, draw(bases["llama"], ("up_proj",)), pickled=False)
    read_checkpoint(path)
    configure(path / CONFIG, **fields)
    assert_refused(path, kind, word, CONFIG)


@pytest.mark.parametrize("option", [{"top_k": 2}, {"temperature": 2.0}, {"router_features": "base"}], ids=str)
def test_option_that_dense_gates_do_not_know_is_refused(bases, tmp_path, option):
    path = write_loramoe(tmp_path, draw(bases["llama"], ("up_proj",)), pickled=False)
    read_checkpoint(path, router_features="layer")
    assert_refused(path, errors.InvalidField, *option, **option)


def test_expert_without_the_shared_half_is_refused(bases, tmp_path):
    path = write_hydralora(tmp_path, draw(bases["llama"], ("up_proj",), shared_a=True), pickled=False)
    read_checkpoint(path)
    edit_tensors(path / WEIGHTS, drop(f"{GATE}.lora_A.weight"))
    assert_refused(path, errors.IncompletePair, "lora_B0")
