"""MoLE by top_k and by threshold, and AdaMoLE, as zefang-liu/AdaMoLE writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dylo_moe import errors, load_checkpoint
from dylo_moe.formats import read_checkpoint
from fixtures.adamole import write_adamole
from fixtures.gated import draw, largest, normalised, probabilities
from harness.specimens import write_base
from tests.unit.formats.gated_case import IDS, assert_equals_the_equation, assert_refused, configure, drop, edit_tensors, put

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


def best_two(x, adapted, layer):
    p = probabilities(x, adapted)
    return normalised(p * largest(p, 2))


def at_least(threshold):
    def weigh(x, adapted, layer):
        p = probabilities(x, adapted)
        return normalised(p * (p >= threshold))

    return weigh


def adaptive(highest):
    def weigh(x, adapted, layer):
        weight, bias = (tensor.double() for tensor in adapted.threshold)
        above = probabilities(x, adapted) - highest / (1 + (-(x @ weight.T) - bias).exp())
        return normalised(above * (above >= 0))

    return weigh


CASES = [
    ("llama", True, {"top_k": 2}, best_two),
    ("llama", False, {"threshold": 0.2}, at_least(0.2)),
    ("gemma", False, {"max_threshold": None}, adaptive(1 / 4)),
    ("llama", False, {"max_threshold": 0.6}, adaptive(0.6)),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_base(root / family, family) for family in ("llama", "gemma")}


@pytest.mark.parametrize(("family", "pickled", "gating", "weigh"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES])
def test_gates_equal_their_equation(bases, tmp_path, family, pickled, gating, weigh):
    mixture = draw(bases[family], ("q_proj", "v_proj", "down_proj"), experts=4)
    path = write_adamole(tmp_path, mixture, pickled=pickled, **gating)
    assert_equals_the_equation(path, "adamole", mixture, weigh)


def test_a_token_that_no_expert_is_sure_of_gets_the_base_alone(bases, tmp_path):
    path = write_adamole(tmp_path, draw(bases["llama"], ("q_proj",), experts=4), pickled=False, threshold=1.0)
    model = load_checkpoint(path)
    with torch.no_grad(), torch.inference_mode():
        logits = model(IDS).logits
        assert model.last_routing_weights.abs().max() == 0
        off = torch.zeros(*IDS.shape, 4)
        assert torch.equal(logits, model(IDS, routing_weights=off).logits)


def test_caller_may_choose_another_k(bases, tmp_path):
    path = write_adamole(tmp_path, draw(bases["llama"], ("q_proj",), experts=4), pickled=False, top_k=2)
    gates = read_checkpoint(path, top_k=3).router.gates
    assert {gate.top_k for gate in gates.values()} == {3}
    assert_refused(path, errors.InvalidField, "top_k", top_k=(2, 2))


@pytest.fixture
def adamole(bases, tmp_path) -> Path:
    return write_adamole(tmp_path, draw(bases["llama"], ("q_proj",), experts=2), pickled=False, max_threshold=0.5)


def change_copy(tensors):
    tensors[f"{MODULE}.moe_layer.experts.1.lora_B.weight"][3, 2] += 1e-6


def change_copys_dtype(tensors):
    name = f"{MODULE}.moe_layer.experts.1.lora_B.weight"
    tensors[name] = tensors[name].double()


DEFECTS = [
    ("copy differs", change_copy, errors.ForeignTensor, "experts.1.lora_B"),
    ("copy has another dtype", change_copys_dtype, errors.ForeignTensor, "experts.1.lora_B"),
    ("copy of nothing", put(f"{MODULE}.moe_layer.experts.2.lora_B.weight", torch.ones(48, 4)), errors.ForeignTensor, "experts.2"),
    ("original gone", drop(f"{MODULE}.lora_A.1.weight"), errors.IncompletePair, "lora_B.1"),
    ("no gate", drop(f"{MODULE}.lora_gating.weight"), errors.GateMissing, "lora_gating.weight"),
    ("no threshold", drop(f"{MODULE}.lora_threshold.weight"), errors.GateMissing, "lora_threshold.weight"),
    ("no threshold bias", drop(f"{MODULE}.lora_threshold.bias"), errors.GateMissing, "lora_threshold.bias"),
    ("wide threshold", put(f"{MODULE}.lora_threshold.weight", torch.ones(2, 48)), errors.ShapeMismatch, "lora_threshold.weight"),
    ("threshold NaN", put(f"{MODULE}.lora_threshold.bias", torch.tensor([torch.nan])), errors.NonFiniteTensor, "lora_threshold"),
    ("gate bias", put(f"{MODULE}.lora_gating.bias", torch.ones(2)), errors.ForeignTensor, "lora_gating.bias"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in DEFECTS], ids=[case[0] for case in DEFECTS])
def test_defective_tensor_is_refused_by_name(adamole, change, kind, word):
    read_checkpoint(adamole)
    edit_tensors(adamole / WEIGHTS, change)
    assert_refused(adamole, kind, word)


def test_checkpoint_without_the_second_names_is_read(adamole):
    edit_tensors(adamole / WEIGHTS, lambda tensors: [tensors.pop(key) for key in list(tensors) if "moe_layer" in key])
    assert read_checkpoint(adamole).num_experts == 2


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"num_experts": 3}, errors.ExpertCountMismatch, "num_experts"),
        ({"num_experts": "2"}, errors.InvalidField, "num_experts"),
        ({"lora_rank": None}, errors.InvalidField, "lora_rank"),
        ({"max_threshold": -0.1}, errors.InvalidField, "max_threshold"),
        ({"max_threshold": "0.5"}, errors.InvalidField, "max_threshold"),
        ({"peft_type": "MOLE", "top_k": 1}, errors.ForeignTensor, "lora_threshold"),
        ({"peft_type": "MOLE"}, errors.InvalidField, "top_k"),
        ({"peft_type": "MOLE", "top_k": 1, "threshold": 0.2}, errors.InvalidField, "top_k"),
        ({"peft_type": "MOLE", "top_k": 3}, errors.InvalidField, "top_k"),
        ({"peft_type": "MOLE", "threshold": 2}, errors.InvalidField, "threshold"),
    ],
    ids=str,
)
def test_defective_configuration_is_refused_by_field(adamole, fields, kind, word):
    read_checkpoint(adamole)
    configure(adamole / CONFIG, **fields)
    assert_refused(adamole, kind, word)
