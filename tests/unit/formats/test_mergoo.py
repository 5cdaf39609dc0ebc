"""mergoo: base, experts and gates in one Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dylo_moe import errors, load_checkpoint
from dylo_moe.formats import read_checkpoint
from fixtures.gated import draw, largest
from fixtures.mergoo import write_mergoo
from fixtures.shards import shard
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

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODULE = "model.layers.1.self_attn.q_proj"
RANKS, ALPHAS = (4, 2, 6), (8, 8, 3)


def best(k):
    """Softmax over the k largest logits."""

    def weigh(x, adapted, layer):
        logits = x @ adapted.gate.double().T
        exponentials = logits.exp() * largest(logits, k)
        return exponentials / exponentials.sum(-1, keepdim=True)

    return weigh


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture
def mergoo(base, tmp_path) -> Path:
    return write_mergoo(tmp_path, draw(base, ("q_proj", "v_proj"), ranks=RANKS, alphas=ALPHAS))


@pytest.mark.parametrize(("k", "shards"), [(1, 0), (2, 3)])
def test_experts_of_their_own_rank_and_alpha_equal_the_equation(base, tmp_path, k, shards):
    mixture = draw(base, ("q_proj", "v_proj", "gate_proj"), ranks=RANKS, alphas=ALPHAS)
    path = write_mergoo(tmp_path, mixture, top_k=k)
    if shards:
        shard(path, shards)
    assert_equals_the_equation(path, "mergoo", mixture, best(k))


def test_pickled_shards_equal_the_equation_with_the_callers_k(base, tmp_path):
    mixture = draw(base, ("q_proj",), seed=4)
    path = shard(write_mergoo(tmp_path, mixture, top_k=1), 2, pickled=True)
    assert_equals_the_equation(path, "mergoo", mixture, best(3), top_k=3)


def test_half_precision_as_mergoo_writes_it_is_computed_with_wide_gates(base, tmp_path):
    path = write_mergoo(tmp_path, draw(base, ("q_proj",)), dtype=torch.float16)
    model = load_checkpoint(path)
    assert model.dtype == torch.float16
    model(IDS)
    assert model.last_routing_weights.dtype == torch.float32
    wide = load_checkpoint(path, dtype=torch.float32)
    half_way = model(IDS).logits.float() - wide(IDS).logits
    assert half_way.abs().max() < 0.1  # float16 keeps 3 digits, of logits up to 10


def test_rank_stabilised_experts_are_scaled_by_the_root(base, tmp_path):
    path = write_mergoo(tmp_path, draw(base, ("q_proj",), ranks=RANKS, alphas=ALPHAS))
    recorded = json.loads((path / CONFIG).read_text())["adapter_configs"]
    configure(path / CONFIG, adapter_configs=[{**each, "use_rslora": True} for each in recorded])
    scalings = [next(iter(expert.modules.values())).scaling for expert in read_checkpoint(path).experts]
    assert scalings == [8 / 4**0.5, 8 / 2**0.5, 3 / 6**0.5]


def test_tokenizer_and_base_come_from_the_checkpoint(mergoo, base):
    checkpoint = read_checkpoint(mergoo)
    assert checkpoint.base_model == str(base)
    assert checkpoint.tokenizer == mergoo
    assert "num_experts" not in checkpoint.base_config
    assert f"{MODULE}.weight" in checkpoint.base_state
    assert not any("base_layer" in name or "lora" in name for name in checkpoint.base_state)


def test_checkpoint_that_was_composed_and_not_trained_is_refused_with_the_reason(base, tmp_path):
    mixture = draw(base, ("q_proj",))
    read_checkpoint(write_mergoo(tmp_path / "trained", mixture))
    path = write_mergoo(tmp_path / "composed", mixture, trained=False)
    assert_refused(path, errors.GateMissing, "composed and not trained", "random")


DEFECTS = [
    ("gate gone", drop(f"{MODULE}.gate.weight"), errors.GateMissing, f"{MODULE}.gate.weight"),
    ("gate of 2", put(f"{MODULE}.gate.weight", torch.ones(2, 48)), errors.ExpertCountMismatch, "2 rows"),
    ("gate of other width", put(f"{MODULE}.gate.weight", torch.ones(3, 47)), errors.ShapeMismatch, "(3, 48)"),
    ("gate NaN", put(f"{MODULE}.gate.weight", torch.full((3, 48), torch.nan)), errors.NonFiniteTensor, "gate"),
    ("base NaN", put("model.norm.weight", torch.full((48,), torch.nan)), errors.NonFiniteTensor, "model.norm"),
    ("half a pair", drop(f"{MODULE}.lora_B.2.weight"), errors.IncompletePair, "lora_A.2"),
    ("gap", drop(f"{MODULE}.lora_A.1.weight", f"{MODULE}.lora_B.1.weight"), errors.ExpertMissing, "expert 1"),
    ("last gone", drop(f"{MODULE}.lora_A.2.weight", f"{MODULE}.lora_B.2.weight"), errors.ExpertCountMismatch, "num_experts"),
    ("rank", put(f"{MODULE}.lora_A.0.weight", torch.ones(2, 48)), errors.ShapeMismatch, "lora_B.0"),
    ("module gone", drop_all(f"{MODULE}.lora"), errors.IncompletePair, MODULE),
    ("base layer gone", drop(f"{MODULE}.base_layer.weight"), errors.ForeignTensor, f"{MODULE}"),
    ("embedding LoRA", put("model.embed_tokens.lora_embedding_A.0", torch.ones(4, 4)), errors.ForeignTensor, "lora_embedding"),
    ("saved module", put("lm_head.modules_to_save.0.weight", torch.ones(4, 4)), errors.ForeignTensor, "modules_to_save"),
    ("layer gone", drop_all("layers.1."), errors.ShapeMismatch, "num_hidden_layers"),
    ("unadapted", drop_all(f"{MODULE}."), errors.IncompletePair, "layer 1: q_proj"),
]


@pytest.mark.parametrize(("change", "kind", "word"), [case[1:] for case in DEFECTS], ids=[case[0] for case in DEFECTS])
def test_defective_tensor_is_refused_by_name(mergoo, change, kind, word):
    read_checkpoint(mergoo)
    edit_tensors(mergoo / WEIGHTS, change)
    assert_refused(mergoo, kind, word)


def test_module_that_should_be_routed_and_is_not_is_refused(mergoo):
    read_checkpoint(mergoo)
    plain = put(f"{MODULE}.weight", torch.ones(48, 48))
    edit_tensors(mergoo / WEIGHTS, lambda tensors: (drop_all(f"{MODULE}.")(tensors), plain(tensors)))
    assert_refused(mergoo, errors.IncompletePair, "router_layers", "layer 1: q_proj")


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"num_experts": 4}, errors.ExpertCountMismatch, "adapter_configs"),
        ({"num_experts": 0}, errors.InvalidField, "num_experts"),
        ({"num_experts_per_tok": 4}, errors.InvalidField, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, errors.InvalidField, "num_experts_per_tok"),
        ({"adapter_configs": [{"r": 4, "lora_alpha": 8}] * 2}, errors.ExpertCountMismatch, "adapter_configs"),
        ({"adapter_configs": [4, 4, 4]}, errors.InvalidField, "adapter_configs[0]"),
        ({"adapter_configs": [{"r": 4, "lora_alpha": 8}] * 3}, errors.ShapeMismatch, "rank 4"),
        ({"adapter_configs": [{"r": 4, "lora_alpha": "8"}] * 3}, errors.InvalidField, "adapter_configs[0].lora_alpha"),
        ({"adapter_configs": [{"r": 4, "lora_alpha": 8, "use_dora": True}] * 3}, errors.InvalidField, "use_dora"),
        ({"router_layers": ["q_proj"]}, errors.InvalidField, "v_proj"),
        ({"router_layers": []}, errors.InvalidField, "router_layers"),
        ({"router_layers": ["q_proj", "v_proj", "k_proj"]}, errors.IncompletePair, "k_proj"),
        ({"router_layers_index": [0]}, errors.InvalidField, "router_layers_index"),
        ({"router_layers_index": [0, 1, 2]}, errors.IncompletePair, "layer 2"),
        ({"router_layers_index": "all"}, errors.InvalidField, "router_layers_index"),
        ({"hidden_size": 10**12}, errors.InvalidField, "hidden_size"),
        ({"vocab_size": 7}, errors.ShapeMismatch, "embed_tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_defective_configuration_is_refused_by_field(mergoo, fields, kind, word):
    read_checkpoint(mergoo)
    configure(mergoo / CONFIG, **fields)
    assert_refused(mergoo, kind, word)
