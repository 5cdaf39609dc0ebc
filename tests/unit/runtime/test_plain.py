"""The short way outside of generations: layers that read one tensor share a product, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from dylo_moe import attach_router, detach_router, load_checkpoint
from dylo_moe.errors import RoutingError
from dylo_moe.siblings import siblings

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model(specimens):
    return load_checkpoint(specimens(features="embedding", top_k=4)).eval()  # dense weights: what the shared product is for


def layer(model, name):
    return next(module for path, module in model.routed_layers().items() if path.endswith(name))


def logits(model, ids, *, grad=False):
    """grad: the long way, in which every layer is alone."""
    with torch.set_grad_enabled(grad):
        return model(ids, use_cache=False).logits.detach()


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products by their number of columns."""

    def __init__(self):
        super().__init__()
        self.columns = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.columns.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def test_q_k_v_and_gate_up_are_multiplied_by_their_a_together(model, ids):
    with Products() as products:
        got = logits(model, ids)
    stacked = sum(len(layer(model, "q_proj").lora_A[name].weight) for name in model.expert_names)
    blocks = model.causal_lm.config.num_hidden_layers
    assert products.columns.count(3 * stacked) == blocks
    torch.testing.assert_close(got, logits(model, ids, grad=True), **CLOSE)


def test_the_first_pass_is_bit_for_bit_as_every_later_one(model, ids):
    first = logits(model, ids)
    assert all(torch.equal(logits(model, ids), first) for _ in range(3))


def scaled(model):
    layer(model, "k_proj").scaling[model.expert_names[1]] *= -3


def through_data(model):
    layer(model, "v_proj").lora_A[model.expert_names[1]].weight.data.mul_(-3)


def through_numpy(model):
    layer(model, "k_proj").lora_B[model.expert_names[0]].weight.detach().numpy()[:] *= -3


def swapped(model):
    a, b = (layer(model, "k_proj").lora_A[name] for name in model.expert_names[:2])
    a.weight, b.weight = b.weight, a.weight


def data_swapped(model):
    for part in ("lora_A", "lora_B"):
        a, b = (getattr(layer(model, "k_proj"), part)[name].weight for name in model.expert_names[:2])
        a.data, b.data = b.data, a.data


def base_hooked(model):
    layer(model, "k_proj").base_layer.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [scaled, through_data, through_numpy, swapped, data_swapped, base_hooked])
def test_a_change_between_two_passes_is_seen(model, ids, change):
    before = logits(model, ids)
    change(model)
    after = logits(model, ids)
    assert not torch.allclose(before, after, **CLOSE)
    torch.testing.assert_close(after, logits(model, ids, grad=True), **CLOSE)


def test_what_a_hook_writes_into_the_shared_input_is_seen(model, ids):
    def write(module, args):
        args[0].mul_(-2)

    before = logits(model, ids)
    layer(model, "k_proj").register_forward_pre_hook(write)
    after = logits(model, ids)
    assert not torch.allclose(before, after, **CLOSE)
    torch.testing.assert_close(after, logits(model, ids, grad=True), **CLOSE)


def test_a_sibling_that_is_given_another_tensor_uses_that(model, ids):
    q, k = layer(model, "q_proj"), layer(model, "k_proj")
    x, other = torch.randn(2, 1, 5, q.in_features)
    weights = torch.rand(1, 5, model.mixture.num_experts)
    with torch.no_grad(), model.mixture.using(weights):
        q(x)
        got = k(other)
    torch.testing.assert_close(got, k.mix(other, weights).detach(), **CLOSE)


def test_what_a_hook_of_the_base_keeps_is_not_written_into(model, ids):
    kept = []
    base = layer(model, "k_proj").base_layer
    logits(model, ids)
    base.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    logits(model, ids)
    x, output = kept[0]
    assert torch.equal(output, torch.nn.functional.linear(x, base.weight, base.bias))


@pytest.mark.parametrize("autocast", [True, False])
def test_experts_on_a_base_of_16_bits_are_multiplied_together_in_their_own_dtype(specimens, ids, autocast):
    path = specimens(features="embedding", top_k=4)
    model = load_checkpoint(path, dtype="bfloat16", autocast_adapter_dtype=autocast).eval()
    with Products() as products:
        got = logits(model, ids)
    stacked = sum(len(layer(model, "q_proj").lora_A[name].weight) for name in model.expert_names)
    assert products.columns.count(3 * stacked) == model.causal_lm.config.num_hidden_layers
    exact = logits(load_checkpoint(path, dtype="float64"), ids)
    error, without = (found.double() - exact for found in (got, logits(model, ids, grad=True)))
    assert error.abs().max() <= 1.5 * without.abs().max()  # both are the base's rounding


def test_a_base_in_another_dtype_than_before_is_noticed(model, ids):
    logits(model, ids)
    model.causal_lm.to(torch.float64)
    for module in model.routed_layers().values():
        module.lora_A.float()
        module.lora_B.float()
    with Products() as products:
        got = logits(model, ids)
    torch.testing.assert_close(got, logits(model, ids, grad=True), **CLOSE)
    stacked = sum(len(layer(model, "q_proj").lora_A[name].weight) for name in model.expert_names)
    assert products.columns.count(3 * stacked) == model.causal_lm.config.num_hidden_layers  # and they go the short way again


@pytest.mark.parametrize("autocast", [True, False])
def test_one_of_many_experts_on_a_base_of_16_bits_is_multiplied_alone(specimens, ids, autocast):
    path = specimens(features="embedding", top_k=1, num_experts=32, ranks=(64,), alphas=(64,))
    model = load_checkpoint(path, dtype="bfloat16", autocast_adapter_dtype=autocast).eval()
    with Products() as products:
        got = logits(model, ids[:1, :1])
    assert 32 * 64 not in products.columns
    exact = logits(load_checkpoint(path, dtype="float64"), ids[:1, :1])
    error, without = (found.double() - exact for found in (got, logits(model, ids[:1, :1], grad=True)))
    assert error.abs().max() <= 1.5 * without.abs().max()


def test_experts_of_one_layer_in_another_dtype_are_computed_in_it(model, ids):
    logits(model, ids)
    for name in model.expert_names:
        layer(model, "k_proj").lora_A[name].to(torch.float64)
        layer(model, "k_proj").lora_B[name].to(torch.float64)
    torch.testing.assert_close(logits(model, ids), logits(model, ids, grad=True), **CLOSE)


def test_layers_whose_adapters_are_disabled_are_their_base(model, ids):
    logits(model, ids)
    for module in model.routed_layers().values():
        module.enable_adapters(False)
    got = logits(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(
            got, model(ids, routing_weights=torch.zeros(model.mixture.num_experts), use_cache=False).logits
        )


def test_a_layer_that_says_it_is_merged_is_refused(model, ids):
    logits(model, ids)
    layer(model, "v_proj").merged_adapters.append(model.expert_names[0])
    with pytest.raises(RoutingError, match="merged"):
        logits(model, ids)


def test_a_layer_in_training_drops_out_without_a_graph_too(model, ids):
    before = logits(model, ids)
    for name in model.expert_names:
        layer(model, "k_proj").lora_dropout[name] = torch.nn.Dropout(0.9)
    torch.testing.assert_close(logits(model, ids), before)
    layer(model, "k_proj").train()
    assert not torch.allclose(logits(model, ids), before, **CLOSE)


def test_the_siblings_of_a_copy_are_the_copys(model, ids):
    twin = copy.deepcopy(model)
    logits(model, ids)
    through_data(twin)
    torch.testing.assert_close(logits(twin, ids), logits(twin, ids, grad=True), **CLOSE)
    assert {id(s) for s in layer(twin, "q_proj").siblings} <= {id(m) for m in twin.routed_layers().values()}


def test_only_names_that_transformers_gives_to_readers_of_one_tensor_are_siblings():
    paths = ["a.q_proj", "a.k_proj", "a.o_proj", "b.v_proj", "b.gate_proj", "b.up_proj", "b.down_proj", "c.q_proj"]
    assert siblings(paths) == [["a.q_proj", "a.k_proj"], ["b.gate_proj", "b.up_proj"]]


def test_a_module_that_transformers_did_not_write_has_no_siblings(model):
    parent = next(module for name, module in model.causal_lm.named_modules() if name.endswith("self_attn"))
    assert parent.q_proj.siblings
    peft_model = detach_router(model)
    parent.__class__ = type("Attention", (type(parent),), {"__module__": "somebody"})
    attach_router(peft_model, model.router)
    assert not parent.q_proj.siblings


def test_a_hook_on_every_module_that_writes_into_what_siblings_read_is_seen(model, ids):
    def doubles(module, args, output):
        if module is layer(model, "q_proj"):
            args[0].mul_(2)

    before = logits(model, ids)
    handle = register_module_forward_hook(doubles)
    try:
        got, wanted = logits(model, ids), logits(model, ids, grad=True)
    finally:
        handle.remove()
    assert (got - before).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, **CLOSE)
