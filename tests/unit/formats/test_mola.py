"""MoLA as its authors write it: more experts in higher layers, k in no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dylo_moe import errors, load_checkpoint
from dylo_moe.formats import read_checkpoint
from fixtures.gated import draw, largest, normalised, probabilities
from fixtures.mola import write_mola
from harness.specimens import write_base
from tests.unit.formats.gated_case import (
    IDS,
    assert_equals_the_equation,
    assert_refused,
    configure,
    drop,
    drop_all,
    edit_tensors,
    put,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


def best(*k: int):
    """Softmax, the k of the layer kept, renormalised."""

    def weigh(x, adapted, layer):
        p = probabilities(x, adapted)
        kept = normalised(p * largest(p, k[layer % len(k)]))
        return torch.nn.functional.pad(kept, (0, 8 - kept.shape[-1]))

    return weigh


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_base(root / family, family) for family in ("llama", "gemma", "gpt2")}


@pytest.fixture
def mola(bases, tmp_path) -> Path:
    mixture = draw(bases["llama"], ("q_proj", "o_proj"), experts=(2, 4), ranks=(2, 4))
    return write_mola(tmp_path, mixture, pickled=False)


@pytest.mark.parametrize(
    ("family", "targets", "pickled"),
    [("llama", ("q_proj", "down_proj"), True), ("gemma", ("v_proj", "up_proj"), False), ("gpt2", ("c_attn",), False)],
)
def test_layers_with_their_own_numbers_of_experts_and_k_equal_the_equation(bases, tmp_path, family, targets, pickled):
    mixture = draw(bases[family], targets, experts=(2, 4), ranks=(2, 5), seed=1)
    path = write_mola(tmp_path, mixture, pickled=pickled)
    assert_equals_the_equation(path, "mola", mixture, best(1, 3), top_k=(1, 3))


def test_one_k_for_all_layers_and_the_live_models_names_equal_the_equation(bases, tmp_path):
    mixture = draw(bases["llama"], ("q_proj", "v_proj"), experts=(3, 3), ranks=(4, 4))
    path = write_mola(tmp_path, mixture, pickled=False, adapter=".default")
    assert_equals_the_equation(path, "mola", mixture, best(2), top_k=2)


def test_expert_that_a_layer_does_not_have_weighs_nothing_there(mola):
    model = load_checkpoint(mola, top_k=2)
    model(IDS)
    weights = model.last_routing_weights
    assert weights[:, :, :2, 2:].abs().max() == 0
    assert weights[:, :, 2:, 2:].abs().max() > 0.1


def test_experts_are_as_many_as_the_largest_layer_has(mola):
    checkpoint = read_checkpoint(mola, top_k=2)
    assert checkpoint.assumptions == {"top_k": 2}
    assert checkpoint.num_experts == checkpoint.router.num_experts == 4
    assert [len(expert.modules) for expert in checkpoint.experts] == [4, 4, 2, 2]
    assert sorted(gate.weight.shape[0] for gate in checkpoint.router.gates.values()) == [2, 2, 4, 4]


def test_k_of_each_layer_is_recorded_as_what_the_caller_said(mola):
    checkpoint = read_checkpoint(mola, top_k=(1, 3))
    assert checkpoint.assumptions == {"top_k": [1, 3]}
    assert {gate.weight.shape[0]: gate.top_k for gate in checkpoint.router.gates.values()} == {2: 1, 4: 3}


def test_missing_k_is_asked_for_in_one_line(mola):
    read_checkpoint(mola, top_k=1)
    assert_refused(mola, errors.InvalidField, "top_k", "one per layer")


@pytest.mark.parametrize(
    ("top_k", "word"),
    [(0, "0"), (3, "from 1 to 2"), (True, "True"), ((1,), "1 values"), ((1, 2, 2), "3 values"), ((1, 5), "5"), ((1.0, 2), "1.0")],
    ids=str,
)
def test_impossible_k_is_refused(mola, top_k, word):
    read_checkpoint(mola, top_k=(2, 4))
    assert_refused(mola, errors.InvalidField, "top_k", word, top_k=top_k)


DEFECTS = [
    ("no gate on a module", drop(f"{MODULE}.router.router.weight"), errors.GateMissing, "router.router.weight"),
    ("no gate at all", drop_all("router"), errors.GateMissing, "router.router.weight"),
    ("gate of 3", put(f"{MODULE}.router.router.weight", torch.ones(3, 48)), errors.ExpertCountMismatch, "3 rows"),
    ("gate of other width", put(f"{MODULE}.router.router.weight", torch.ones(4, 47)), errors.ShapeMismatch, "(4, 48)"),
    ("NaN", put(f"{MODULE}.router.router.weight", torch.full((4, 48), torch.nan)), errors.NonFiniteTensor, "router"),
    ("half a pair", drop(f"{MODULE}.lora_B_3.weight"), errors.IncompletePair, "lora_A_3"),
    ("gap", drop(f"{MODULE}.lora_A_1.weight", f"{MODULE}.lora_B_1.weight"), errors.ExpertMissing, "expert 1"),
    ("fewer", drop(f"{MODULE}.lora_A_3.weight", f"{MODULE}.lora_B_3.weight"), errors.ExpertCountMismatch, "4 rows"),
    ("foreign", put(f"{MODULE}.lora_embedding_A_0", torch.ones(2, 2)), errors.ForeignTensor, "lora_embedding"),
    ("two adapters", put(f"{MODULE}.lora_A.other_0.weight", torch.ones(4, 48)), errors.ForeignTensor, ".other"),
    ("plain LoRA", put(f"{MODULE}.lora_A.weight", torch.ones(4, 48)), errors.ForeignTensor, "q_proj.lora_A.weight"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in DEFECTS], ids=[case[0] for case in DEFECTS])
def test_defective_tensor_is_refused_by_name(mola, change, kind, word):
    read_checkpoint(mola, top_k=2)
    edit_tensors(mola / WEIGHTS, change)
    assert_refused(mola, kind, word, top_k=2)


def test_one_layer_with_two_numbers_of_experts_is_refused(mola):
    read_checkpoint(mola, top_k=2)
    gone = drop(f"{MODULE}.lora_A_3.weight", f"{MODULE}.lora_B_3.weight")
    edit_tensors(mola / WEIGHTS, gone)
    edit_tensors(mola / WEIGHTS, put(f"{MODULE}.router.router.weight", torch.ones(3, 48)))
    assert_refused(mola, errors.ShapeMismatch, "of the same layer", top_k=2)


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"r": [2]}, errors.InvalidField, "1 ranks"),
        ({"r": [2, 8]}, errors.ShapeMismatch, "rank 8"),
        ({"r": [2, 0]}, errors.InvalidField, " r:"),
        ({"r": 4}, errors.ShapeMismatch, "rank 4"),
        ({"bias": "lora_only"}, errors.InvalidField, "bias"),
        ({"layers_to_transform": [1]}, errors.InvalidField, "target_modules"),
        ({"layers_to_transform": "1"}, errors.InvalidField, "layers_to_transform"),
    ],
    ids=str,
)
def test_defective_configuration_is_refused_by_field(mola, fields, kind, word):
    read_checkpoint(mola, top_k=2)
    configure(mola / CONFIG, **fields)
    assert_refused(mola, kind, word, CONFIG, top_k=2)
