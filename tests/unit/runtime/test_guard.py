"""PEFT's methods that would break a routed model are refused before they change anything."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dylo_moe import DynamicHybridRouter, MoELoraConfig, attach_router, detach_router
from dylo_moe.errors import RoutingError
from dylo_moe.guard import unguard
from tests.unit.runtime.tiny_peft import VOCABULARY, load, write_bases

# expert_0 is PEFT's active adapter and has an embedding of its own, which PEFT would unload before any layer is asked.
OWN = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "init_lora_weights": False}
PLAIN = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False}
NEW_PLACE = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
METHODS = {
    "unload": lambda m: m.unload(),
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_adapter": lambda m: m.merge_adapter(),
    "delete_adapter": lambda m: m.delete_adapter("expert_0"),
    "add_adapter": lambda m: m.add_adapter("more", NEW_PLACE),
    "add_weighted_adapter": lambda m: m.add_weighted_adapter(["expert_0", "expert_1"], [1.0, 1.0], "more", "linear"),
}
IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def routed(bases):
    torch.manual_seed(0)
    peft_model = get_peft_model(load(bases / "qwen"), LoraConfig(**OWN), adapter_name="expert_0")
    peft_model.add_adapter("expert_1", LoraConfig(**PLAIN))
    config = MoELoraConfig(num_experts=2, top_k_experts=2)
    return attach_router(peft_model, DynamicHybridRouter(32, 2, top_k=2), config).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", METHODS)
def test_refused_method_changes_nothing(bases, tmp_path, name):
    model = routed(bases)
    before, adapters = logits(model), list(model.peft_model.peft_config)
    with pytest.raises(RoutingError, match=f"{name} would break.*detach_router first"):
        METHODS[name](model.peft_model)
    assert torch.equal(logits(model), before)
    assert list(model.peft_model.peft_config) == adapters
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(copy.deepcopy(model)), before)


def test_without_the_guard_unloading_would_silently_give_the_base(bases):
    model = routed(bases)
    before = logits(model)
    unguard(model.peft_model)
    model.peft_model.unload()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["unload", "delete_adapter", "add_adapter", "merge_and_unload"])
def test_after_detach_they_are_pefts_own_again(bases, name):
    peft_model = detach_router(routed(bases))
    METHODS[name](peft_model)
    assert not any("dylo_moe" in type(value).__module__ for value in vars(peft_model.base_model).values())


def test_a_detached_model_does_not_take_another_ones_routing_off(bases):
    first = routed(bases)
    second = attach_router(detach_router(first), first.router, first.moe_config).eval()
    before = logits(second)
    with pytest.raises(RoutingError, match="detached already"):
        detach_router(first)
    assert torch.equal(logits(second), before)
