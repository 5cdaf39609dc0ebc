"""Gates: each rule against NumPy written out here, and models whose layers each have a gate of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from dylo_moe import MoELoraConfig, attach_router, detach_router
from dylo_moe.errors import RoutingError
from dylo_moe.formats import GATE_RULES, GatesState, GateState
from dylo_moe.gates import LayerGate
from harness.specimens import write_base

E, INPUTS = 5, 6


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def by_definition(
    rule: str, logits: np.ndarray, threshold_logit: np.ndarray, *, k=2, temperature=0.7, threshold=0.3
) -> np.ndarray:
    """One token's weights, expert by expert."""
    p = softmax(logits)
    score = {"topk_softmax": logits, "arrow": np.abs(logits)}.get(rule, p)
    best = np.argsort(-score)
    w = np.zeros(len(logits))
    if rule in ("softmax", "switch"):
        return p if rule == "softmax" else p * (p == p.max())
    if rule == "topk_softmax":
        w[best[:k]] = softmax(logits[best[:k]])
    elif rule == "arrow":
        w[best[:k]] = softmax(np.abs(logits)[best[:k]] / temperature)
    elif rule == "softmax_topk":
        w[best[:k]] = p[best[:k]] / p[best[:k]].sum()
    elif rule == "top_p":
        total = 0.0
        for expert in best:
            if total > threshold:
                break
            w[expert] = p[expert] / temperature
            total += p[expert] / temperature
    elif rule == "threshold":
        w = np.where(p >= threshold, p, 0)
        w = w / w.sum() if w.sum() else w
    elif rule == "adaptive_threshold":
        w = np.maximum(p - threshold / (1 + np.exp(-threshold_logit)), 0)
        w = w / w.sum() if w.sum() else w
    return w


def make_gate(rule: str, experts: int = E, **given) -> LayerGate:
    generator = torch.Generator().manual_seed(3)
    state = GateState(
        weight=torch.randn(experts, INPUTS, generator=generator),
        bias=torch.randn(experts, generator=generator),
        top_k=given.pop("top_k", 2),
        threshold_weight=torch.randn(1, INPUTS, generator=generator),
        threshold_bias=torch.randn(1, generator=generator),
    )
    settings = {"temperature": 0.7, "threshold": 0.3, "mixlora_switch": "training", "expert_capacity": 2}
    return LayerGate(state, GatesState({}, rule, E, **settings | given))


@pytest.mark.parametrize("rule", GATE_RULES)
def test_each_rule_equals_its_definition_token_by_token(rule):
    gate = make_gate(rule).double()
    x = torch.randn(2, 40, INPUTS, dtype=torch.float64)
    logits, threshold = gate.gate(x).detach().numpy(), gate.threshold_gate(x).detach().numpy()[..., 0]
    want = np.stack([[by_definition(rule, logits[b, t], threshold[b, t]) for t in range(40)] for b in range(2)])
    assert np.abs(gate(x).detach().numpy() - want).max() < 1e-14
    same = {rule, *(("softmax_topk", "topk_softmax") if "topk" in rule else ())}  # one equation in two orders
    others = [make_gate(other).double()(x).detach().numpy() for other in GATE_RULES if other not in same]
    assert min(np.abs(other - want).max() for other in others) > 1e-3  # no two rules are the same on this input


def test_experts_that_a_unit_does_not_have_get_no_weight():
    weights = make_gate("softmax", experts=3)(torch.randn(1, 4, INPUTS))
    assert weights.shape == (1, 4, E)
    assert torch.equal(weights[..., 3:], torch.zeros(1, 4, 2))
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4))


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_the_first_tokens_of_each_row_that_chose_an_expert_are_within_its_capacity(capacity):
    gate = make_gate("switch", expert_capacity=capacity)
    chosen = torch.tensor([[0, 2, 2, 0, 2, 2], [2, 2, 2, 1, 0, 0]])
    weights = 0.4 * nn.functional.one_hot(chosen, E)
    got = gate.within_capacity(weights, None)[..., 0].int().tolist()
    assert got[0] == {1: [1, 1, 0, 0, 0, 0], 2: [1, 1, 1, 1, 0, 0], 3: [1, 1, 1, 1, 1, 0]}[capacity]
    assert got[1] == {1: [1, 0, 0, 1, 1, 0], 2: [1, 1, 0, 1, 1, 1], 3: [1, 1, 1, 1, 1, 1]}[capacity]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    for tokens in (mask, mask.bool()):
        padded = gate.within_capacity(weights, tokens)[..., 0].int().tolist()
        assert padded[0] == got[0] and padded[1] == [0, 0, 1, 1, 1, 0]


def test_a_16_bit_gate_computes_in_float32_and_gives_its_tensors_back():
    state = GateState(weight=torch.randn(E, INPUTS).bfloat16(), top_k=1)
    gate = LayerGate(state, GatesState({}, "topk_softmax", E))
    assert gate(torch.randn(1, 2, INPUTS, dtype=torch.bfloat16)).dtype == torch.float32
    assert torch.equal(gate.state().weight.bfloat16(), state.weight) and gate.state().bias is None


@pytest.mark.parametrize(
    ("rule", "changes", "word"),
    [
        ("softmax_topk", {"top_k": E + 1}, "top_k=6"),
        ("arrow", {"top_k": None}, "top_k=None"),
        ("arrow", {"temperature": 0.0}, "temperature=0.0"),
        ("top_p", {"threshold": None}, "threshold"),
        ("top_p", {"temperature": 0.0}, "temperature=0.0"),
        ("switch", {"mixlora_switch": None}, "mixlora_switch"),
        ("switch", {"mixlora_switch": "batch"}, "mixlora_switch"),
        ("switch", {"expert_capacity": None}, "expert_capacity"),
        ("largest", {}, "largest"),
    ],
)
def test_impossible_gates_are_refused(rule, changes, word):
    make_gate("softmax_topk")
    with pytest.raises(RoutingError, match=word):
        make_gate(rule, **changes)


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("gates") / "llama", "llama")


def make_model(base_directory, *, shared: str | None = None, gates: int | None = None, experts: int = 3):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    model = None
    for e in range(experts):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name="expert_0")
        else:
            model.add_adapter(f"expert_{e}", config)
    if shared is not None:
        model.add_adapter(shared, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    widths = [m.in_features for n, m in base.named_modules() if hasattr(m, "lora_A") and "expert_0" in m.lora_A]
    states = [GateState(weight=torch.randn(experts, width) / width**0.5, top_k=2) for width in widths[:gates]]
    router = nn.ModuleList(LayerGate(state, GatesState({}, "softmax_topk", experts)) for state in states)
    features = {"num_experts": experts, "router_type": "gates", "router_features": "layer", "shared_adapter": shared}
    return attach_router(model, router, MoELoraConfig(**features)).eval()


def test_every_layer_is_routed_by_its_own_gate(base_directory, ids):
    model = make_model(base_directory)
    seen = {}
    for index, (name, layer) in enumerate(model.routed_layers().items()):
        layer.base_layer.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0]))
        assert layer.index == index, name
    with torch.no_grad():
        logits = model(ids).logits
        want = torch.stack([model.router[index](seen[index]) for index in range(len(seen))], dim=2)
        assert torch.equal(model.last_routing_weights, want)
        assert (want[:, :, 0] - want[:, :, 2]).abs().max() > 0.1
        assert torch.equal(model(ids, routing_weights=want).logits, logits)


def test_cached_generation_with_gates_equals_recomputation(base_directory, ids):
    model = make_model(base_directory)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_the_shared_adapter_is_always_added_with_weight_one(base_directory, ids):
    model = make_model(base_directory, shared="attention")
    assert model.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert [layer.index for layer in model.routed_layers().values()] == [None, 0, 1, None, 2, 3]
    weights = torch.zeros(1, 1, 3)
    with torch.no_grad():
        alone, single = model(ids, routing_weights=weights).logits, model(ids, expert_id=1).logits
    peft_model = detach_router(model)
    with torch.no_grad():
        peft_model.base_model.set_adapter(["attention"])
        assert torch.allclose(peft_model(ids).logits, alone, atol=1e-6)
        peft_model.base_model.set_adapter(["attention", "expert_1"])  # in the order of ours: the sum rounds the same
        assert torch.allclose(peft_model(ids).logits, single, atol=1e-6)
        with peft_model.disable_adapter():
            assert (peft_model(ids).logits - alone).abs().max() > 1e-2


def test_gates_and_experts_get_gradients(base_directory, ids):
    model = make_model(base_directory, shared="attention").train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name or name.startswith("router.")
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == wanted, name


@pytest.mark.parametrize(("gates", "word"), [(3, "3 gates for 4")])
def test_too_few_gates_are_refused(base_directory, gates, word):
    make_model(base_directory)
    with pytest.raises(RoutingError, match=word):
        make_model(base_directory, gates=gates)


def test_a_shared_adapter_that_does_not_exist_is_refused(base_directory):
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    peft_model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), adapter_name="expert_0")
    with pytest.raises(RoutingError, match="shared_adapter='other'"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=1, shared_adapter="other"))
