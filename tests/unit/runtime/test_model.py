"""The routed model against stock PEFT and against itself computed another way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dylo_moe import DyLoRA_MoE, DynamicHybridRouter, ExpertManager, MoELoraConfig, attach_router, detach_router, load_checkpoint
from dylo_moe.errors import CacheWithoutFeatures, RoutingError, UnknownExpert
from tests.unit.runtime.stock import E, gate_of, stock_peft

FAMILIES = ("llama", "gemma", "gpt2", "qwen")


def routed(specimens, family="llama", features="base", **config) -> DyLoRA_MoE:
    path = specimens(family)
    config = MoELoraConfig(num_experts=E, router_features=features, **config)
    return attach_router(stock_peft(path, path.parent / family), gate_of(path), config).eval()


def close(a, b, scale=1e-5):
    # float32 sums in another order, through a few layers: 1e-5 of the largest logit is some 80 units of roundoff.
    assert (a - b).abs().max() <= scale * max(1.0, b.abs().max().item()), (a - b).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_id_is_stock_peft_bitwise_and_one_hot_weights_nearly(specimens, ids, family):
    path = specimens(family)
    peft_model = stock_peft(path, path.parent / family)
    with torch.no_grad():
        wanted = []
        for e in range(E):
            peft_model.set_adapter(f"expert_{e}")
            wanted.append(peft_model(ids).logits)
        model = attach_router(peft_model, gate_of(path))
        for e in range(E):
            one_hot = nn.functional.one_hot(torch.full((3, 9), e), E).float()
            assert torch.equal(model(ids, expert_id=e).logits, wanted[e])
            close(model(ids, routing_weights=one_hot).logits, wanted[e])
            assert torch.equal(model.last_routing_weights, one_hot)
        rows = model(ids, expert_id=torch.tensor([2, 0, 3])).logits
        close(rows, torch.stack([wanted[2][0], wanted[0][1], wanted[3][2]]))


@pytest.mark.parametrize("features", ["base", "all_experts", "embedding"])
def test_router_sees_the_features_that_were_asked_for(specimens, ids, features):
    model = routed(specimens, features=features)
    with torch.no_grad():
        model(ids)
        got = model.last_routing_weights
        if features == "embedding":
            hidden = model.causal_lm.get_input_embeddings()(ids)
        else:
            weights = torch.full((1, 1, E), float(features == "all_experts"))
            hidden = model(ids, routing_weights=weights, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(got, model.router(hidden))
    assert got.shape == (3, 9, E)
    assert (got.argmax(-1) != got.argmax(-1)[0, 0]).any(), "the specimen's router should not choose one expert everywhere"


def test_layer_features_route_each_layer_by_its_own_input(specimens, ids):
    path = specimens("llama", "layer", targets="attention")
    model = load_checkpoint(path)
    layers = list(model.routed_layers().values())
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    assert model.last_routing_weights.shape == (3, 9, len(layers), E)
    for index, x in enumerate(seen):
        assert torch.equal(model.last_routing_weights[:, :, index], model.router(x))


def test_layer_features_need_layers_of_the_routers_width(specimens):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    with pytest.raises(RoutingError, match="down_proj has width"):
        attach_router(peft_model, gate_of(path), MoELoraConfig(num_experts=E, router_features="layer"))
    attach_router(peft_model, gate_of(path))  # the refused attempt left nothing behind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", ["base", "all_experts", "embedding"])
def test_cached_decode_equals_recomputation(specimens, ids, family, features):
    model = routed(specimens, family, features)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :4], use_cache=True)
        parts = [out.logits]
        for t in range(4, 9):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(specimens, ids, family):
    model = routed(specimens, family)
    pad = torch.zeros(3, 2, dtype=torch.long)
    with torch.no_grad():
        plain = model(ids).logits
        for sides, cut in (((pad, ids), slice(2, None)), ((ids, pad), slice(0, 9))):
            mask = torch.cat([torch.ones_like(t) if t is ids else torch.zeros_like(t) for t in sides], 1)
            close(model(torch.cat(sides, 1), attention_mask=mask).logits[:, cut], plain)


def test_cache_of_another_model_is_refused_when_the_router_needs_its_own_half(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        foreign = model.causal_lm.base_model
        with model.mixture.using(None):
            cache = foreign(ids, use_cache=True).past_key_values
        with pytest.raises(CacheWithoutFeatures, match="9 tokens"):
            model(ids[:, :1], past_key_values=cache)
        model(ids)  # and the refusal leaves no route behind
        assert not model.mixture.active


def test_cache_that_skipped_the_router_for_a_step_is_refused(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        cache = model(ids[:, 4:5], expert_id=0, past_key_values=cache).past_key_values
        with pytest.raises(CacheWithoutFeatures, match="5 tokens but the router's features of only 4"):
            model(ids[:, 5:6], past_key_values=cache)


def test_training_after_inference_mode(specimens, ids):
    model = routed(specimens)
    with torch.inference_mode():
        model(ids)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.router.gate.weight.grad.any()


def test_router_follows_the_base_into_evaluation_when_attached(specimens):
    path = specimens("llama")
    router = gate_of(path).train()
    assert not attach_router(stock_peft(path, path.parent / "llama"), router).router.training
    router = gate_of(path).eval()
    assert attach_router(stock_peft(path, path.parent / "llama").train(), router).router.training


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"expert_id": E}, UnknownExpert, "from 0 to 3"),
        ({"expert_id": torch.tensor([0, 1, E])}, UnknownExpert, "from 0 to 3"),
        ({"routing_weights": torch.ones(3, 9, E + 1)}, RoutingError, "routing_weights of shape"),
        ({"routing_weights": torch.ones(2, 9, E)}, RoutingError, "routing_weights of shape"),
        ({"routing_weights": torch.ones(3, 8, E)}, RoutingError, "routing_weights of shape"),
        ({"routing_weights": torch.ones(0, 9, E)}, RoutingError, "routing_weights of shape"),
        ({"routing_weights": torch.ones(3, 9, 2, E)}, RoutingError, "routed layers"),
        ({"routing_weights": torch.ones(3, 9, 99, E)}, RoutingError, "routed layers"),
        ({"routing_weights": torch.ones(3, 9, E), "expert_id": 0}, RoutingError, "one of them"),
        ({"input_ids": None}, RoutingError, "neither input_ids nor inputs_embeds"),
    ],
)
def test_impossible_request_is_refused_and_leaves_the_model_usable(specimens, ids, arguments, error, text):
    model = routed(specimens)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(error, match=text):
            model(**{"input_ids": ids, **arguments})
        assert torch.equal(model(ids).logits, before)


def test_per_layer_weights_equal_per_token_weights_when_all_layers_agree(specimens, ids):
    model = routed(specimens)
    weights = torch.rand(3, 9, E)
    with torch.no_grad():
        by_token = model(ids, routing_weights=weights).logits
        layers = len(model.routed_layers())
        by_layer = model(ids, routing_weights=weights.unsqueeze(2).expand(-1, -1, layers, -1)).logits
        zeroed = weights.unsqueeze(2).repeat(1, 1, layers, 1)
        zeroed[:, :, -1] = 0
        other = model(ids, routing_weights=zeroed).logits
    assert torch.equal(by_token, by_layer)
    assert not torch.equal(by_token, other)


def test_peft_model_itself_is_routed_and_disable_adapter_gives_the_base(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        assert torch.equal(model.peft_model(ids).logits, model(ids).logits)
        with model.peft_model.disable_adapter():
            base = model.peft_model(ids).logits
        assert torch.equal(base, model(ids, routing_weights=torch.zeros(1, 1, E)).logits)


def test_loss_is_the_base_loss_plus_the_weighted_auxiliary_loss(specimens, ids):
    model = routed(specimens, router_aux_loss_coef=0.5).train()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    weights = model.last_routing_weights[mask.bool()]
    expected = ((weights.mean(0) - 1 / E) ** 2).mean()
    assert out.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    given = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), routing_weights=model.last_routing_weights)
    assert given.aux_loss is None
    assert out.loss.item() == pytest.approx(given.loss.item() + 0.5 * out.aux_loss.item(), rel=1e-5)


def test_gradients_reach_router_and_every_expert_and_not_the_base(specimens, ids):
    model = routed(specimens).train()
    model(ids, labels=ids).loss.backward()
    missing = [n for n, p in model.named_parameters() if ("lora_" in n or "router" in n) and (p.grad is None or not p.grad.any())]
    assert missing == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and "lora_" not in n and "router" not in n] == []


@pytest.mark.parametrize("features", ["base", "embedding"])
def test_gradient_checkpointing_changes_no_gradient_even_with_two_forwards_before_backward(specimens, ids, features):
    model = routed(specimens, features=features).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        first = model(ids, labels=ids).loss
        second = model(ids.flip(0), labels=ids.flip(0), routing_weights=torch.rand(1, 1, E, generator=torch.manual_seed(3))).loss
        (first + 2 * second).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        close(grads[1][name], gradient)


def test_detach_gives_the_peft_model_back_exactly(specimens, ids):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    base = peft_model.get_base_model()
    state = {k: v.clone() for k, v in peft_model.state_dict().items()}
    modules = {n: type(m) for n, m in peft_model.named_modules()}
    flags = {n: p.requires_grad for n, p in peft_model.named_parameters()}
    with torch.no_grad():
        wanted = peft_model(ids).logits
    model = attach_router(peft_model, gate_of(path)).train()
    assert list(peft_model.state_dict()) == list(state)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    assert detach_router(model) is peft_model
    assert {n: type(m) for n, m in peft_model.named_modules()} == modules
    assert {n: p.requires_grad for n, p in peft_model.named_parameters()} == flags
    assert all(torch.equal(v, state[k]) for k, v in peft_model.state_dict().items())
    assert not base._forward_hooks and not base._forward_pre_hooks
    assert not any("RoutedCheckpoint" in type(getattr(m, "_gradient_checkpointing_func", None)).__name__ for m in base.modules())
    with torch.no_grad():
        assert torch.equal(peft_model(ids).logits, wanted)


def test_two_models_and_a_deep_copy_share_nothing(specimens, ids):
    first, second = routed(specimens), routed(specimens, features="embedding")
    with torch.no_grad():
        a, b = first(ids).logits, second(ids).logits
        twin = copy.deepcopy(first)
        twin.expert_manager.set_active_expert(1)
        twin(ids)
        assert torch.equal(first(ids).logits, a)
        assert torch.equal(second(ids).logits, b)
        assert not torch.equal(twin(ids).logits, a)


def test_dtype_move_reaches_experts_and_router(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        before = model(ids).logits
        wide = model.double()(ids).logits
    assert wide.dtype == torch.float64
    close(before.double(), wide)


def test_compiled_forward_equals_eager(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        close(torch.compile(model, backend="eager")(ids, use_cache=False).logits, eager)


def test_numbers_of_experts_that_disagree_are_refused(specimens):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    with pytest.raises(RoutingError, match="adapters=4, config.num_experts=4, router.num_experts=3"):
        attach_router(peft_model, DynamicHybridRouter(8, 3))
    with pytest.raises(RoutingError, match="takes inputs of width 8"):
        attach_router(peft_model, DynamicHybridRouter(8, 4))


def test_config_that_contradicts_the_router_is_refused(specimens):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    with pytest.raises(RoutingError, match="top_k_experts=3, but the router's top_k is 1"):
        attach_router(peft_model, gate_of(path), MoELoraConfig(num_experts=E, top_k_experts=3))
    with pytest.raises(RoutingError, match="router_temperature=1.0, but the router's temperature is 2.0"):
        attach_router(peft_model, gate_of(path), MoELoraConfig(num_experts=E, router_temperature=1.0))


def test_detached_model_refuses_to_run_instead_of_running_unrouted(specimens, ids):
    model = routed(specimens)
    detach_router(model)
    with pytest.raises(RoutingError, match="was detached"):
        model(ids, expert_id=1)


def test_numpy_integer_is_an_expert_id(specimens, ids):
    model = routed(specimens)
    with torch.no_grad():
        assert torch.equal(model(ids, expert_id=np.int64(2)).logits, model(ids, expert_id=2).logits)


@pytest.mark.parametrize("method", [lambda m: m.merge_and_unload(), lambda m: m.delete_adapter("expert_1")])
def test_peft_methods_that_would_break_a_routed_model_are_refused(specimens, ids, method):
    model = routed(specimens)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RoutingError, match="detach_router first"):
            method(model.peft_model)
        assert torch.equal(model(ids).logits, before)


def test_biases_trained_beside_the_experts_are_refused(specimens):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(specimens("gpt2").parent / "gpt2")
    peft_model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], bias="all"))
    with pytest.raises(RoutingError, match="bias='all'"):
        attach_router(peft_model, DynamicHybridRouter(base.config.hidden_size, 1))


def test_routing_twice_is_refused(specimens):
    model = routed(specimens)
    with pytest.raises(RoutingError, match="routed already"):
        attach_router(model.peft_model, model.router)


def test_variant_that_needs_the_whole_sequence_is_refused_by_name(specimens):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(specimens("llama").parent / "llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    with pytest.raises(RoutingError, match="ALora"):
        attach_router(peft_model, DynamicHybridRouter(base.config.hidden_size, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", ["base", "embedding"])
def test_save_and_load_is_bitwise(specimens, ids, tmp_path, family, features):
    model = load_checkpoint(specimens(family, features))
    model.save_pretrained(tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert again.features == features
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_loaded_checkpoint_equals_stock_peft_with_the_router_attached(specimens, ids):
    path = specimens("llama")
    loaded = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, routed(specimens)(ids).logits)


class TestExpertManager:
    def test_experts_are_created_on_one_base_and_start_as_zero_deltas(self, specimens, ids):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(specimens("gpt2").parent / "gpt2").eval()
        with torch.no_grad():
            wanted = base(ids).logits
        manager = ExpertManager(base, lora_r=3, lora_alpha=6)
        assert manager.num_experts == 0
        assert [manager.create_expert(), manager.create_expert(r=5)] == [0, 1]
        assert manager.num_experts == 2
        with torch.no_grad():
            assert torch.equal(manager.model.eval()(ids).logits, wanted)
        assert manager.current_expert_id == 0
        manager.set_active_expert(1)
        assert manager.current_expert_id == 1
        assert manager.model.active_adapters == ["expert_1"]
        manager.activate_all_experts()
        assert manager.current_expert_id is None

    def test_active_expert_of_a_routed_model_overrides_the_router_until_all_are_active(self, specimens, ids):
        model = routed(specimens)
        with torch.no_grad():
            routed_logits = model(ids).logits
            model.expert_manager.set_active_expert(2)
            assert torch.equal(model(ids).logits, model(ids, expert_id=2).logits)
            trainable = {n.split(".")[-2] for n, p in model.peft_model.named_parameters() if p.requires_grad}
            model.expert_manager.activate_all_experts()
            assert torch.equal(model(ids).logits, routed_logits)
        assert trainable == {"expert_2"}

    def test_expert_out_of_range_and_growth_under_a_router_are_refused(self, specimens):
        manager = routed(specimens).expert_manager
        with pytest.raises(UnknownExpert):
            manager.set_active_expert(E)
        with pytest.raises(RoutingError, match="detach_router"):
            manager.create_expert()
