"""Mixing of whole feed-forward blocks: MixLoRA's equation in float64, and the laws that every routed model keeps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from dylo_moe import MoELoraConfig, attach_router, detach_router, load_checkpoint
from dylo_moe.errors import CheckpointError, RoutingError
from dylo_moe.feed_forward import RoutedFeedForward
from dylo_moe.loading import add_experts
from fixtures.moe_peft import Recipe, adapter_tensors, write_moe_peft
from fixtures.moe_peft_equation import gate_weights, reference_model
from harness.specimens import write_base

ACTIVATIONS = {"llama": "silu", "gemma": "gelu_pytorch_tanh", "qwen": "silu"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: write_base(root / family, family) for family in ACTIVATIONS}


@pytest.fixture
def load(bases, tmp_path):
    """Recipe and family -> our model in float64, in evaluation mode."""

    def loaded(recipe: Recipe, family: str = "llama", **options):
        directory = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        write_moe_peft(directory, bases[family], replace(recipe, act_fn=ACTIVATIONS[family], safetensors=True))
        model = load_checkpoint(directory, **options)
        return model if options else model.double()

    return loaded


def padded(ids: torch.Tensor) -> torch.Tensor:
    """Left padding of 0, 3 and 6 tokens."""
    return (torch.arange(ids.shape[1]) >= torch.tensor([[0], [3], [6]])).long()


def wanted(base, recipe, ids, mask):
    tensors = {key: tensor.double() for key, tensor in adapter_tensors(recipe, base).items()}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return reference_model(base, recipe, tensors)(ids, attention_mask=mask, position_ids=positions).logits


def loss_of(model, ids):
    """In float64; transformers' own loss is float32."""
    return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


CASES = [
    ("llama", Recipe(num_experts=2, top_k=1)),
    ("llama", Recipe(num_experts=8, top_k=3, rank=2, use_rslora=True)),
    ("gemma", Recipe(num_experts=3, top_k=2)),
    ("qwen", Recipe(num_experts=4, top_k=2, targets=("k_proj", "o_proj", "down_proj"))),
    ("llama", Recipe(num_experts=3, expert_lora={"r": 3, "lora_alpha": 5})),
    ("llama", Recipe("mixlora-dynamic", num_experts=5, top_p=0.5)),
    ("gemma", Recipe("mixlora-dynamic", num_experts=4, top_p=0.7, temperature=0.8)),
    ("llama", Recipe("loramoe", num_experts=3)),
    ("qwen", Recipe("loramoe", num_experts=2, targets=("q_proj", "up_proj"))),
    ("llama", Recipe("mola", num_experts=4, top_k=2)),
    ("gemma", Recipe("mola", num_experts=3, top_k=1, use_rslora=True)),
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_logits_of_a_padded_batch_equal_the_equation_in_float64(bases, load, ids, family, recipe):
    mask = padded(ids)
    want = wanted(bases[family], recipe, ids, mask)
    model = load(recipe, family)
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        other = model(ids, attention_mask=mask, expert_id=0).logits
    assert (got - want)[mask.bool()].abs().max() < 1e-11
    assert (other - want)[mask.bool()].abs().max() > 0.1  # it matters how the experts are mixed


def test_mixing_the_linears_of_the_block_instead_gives_other_logits(load, bases, ids):
    recipe = Recipe(targets=("gate_proj", "down_proj", "up_proj"))
    model = load(recipe)
    with torch.no_grad():
        mixed = model(ids).logits
        weights = model.last_routing_weights
        layered = attach_router(detach_router(model), None)
        per_linear = layered(ids, routing_weights=weights.repeat_interleave(3, dim=2)).logits
    assert (mixed - per_linear).abs().max() > 0.1


@pytest.mark.parametrize(
    "recipe", [Recipe(top_k=2), Recipe("mixlora-dynamic", top_p=0.5), Recipe("mola")], ids=lambda r: r.strategy
)
def test_gradients_of_gates_experts_and_shared_adapter_equal_the_equation(bases, load, ids, recipe):
    tensors = {k: t.double().requires_grad_() for k, t in adapter_tensors(recipe, bases["llama"]).items()}
    loss_of(reference_model(bases["llama"], recipe, tensors), ids).backward()
    model = load(recipe).train()
    loss_of(model, ids).backward()
    prefix = f"{recipe.peft_type.lower()}."
    layers = model.routed_layers()
    compared = 0
    for name, layer in layers.items():
        for adapter in layer.lora_A:
            place = f"{prefix}{name.removeprefix('model.')}"
            place += f".experts.{adapter.removeprefix('expert_')}" if adapter != "shared" else ""
            for half in ("lora_A", "lora_B"):
                got, want = getattr(layer, half)[adapter].weight.grad, tensors[f"{place}.{half}.weight"].grad
                assert (got - want).abs().max() < 1e-12 < want.abs().max(), (name, adapter, half)
                compared += 1
    gates = [key for key in tensors if "moe_gate" in key]
    order = list(model._units)
    for key in gates:
        unit = f"model.{key.removeprefix(prefix).removesuffix('.moe_gate.weight')}"
        got = model.router[order.index(unit)].gate.weight.grad
        assert (got - tensors[key].grad).abs().max() < 1e-12 < tensors[key].grad.abs().max(), key
    assert compared + len(gates) == len(tensors)


def test_gradient_checkpointing_gives_the_same_gradients(load, ids):
    plain, saving = load(Recipe()).train(), load(Recipe()).train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    pairs = list(zip(plain.parameters(), saving.parameters(), strict=True))
    assert sum(a.grad is not None for a, _ in pairs) > 20
    for a, b in pairs:
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-13)


def test_an_expert_that_no_token_uses_is_not_run_and_gets_no_gradient(load, ids):
    model = load(Recipe()).train()
    weights = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).expand(*ids.shape, 3)
    model(ids, routing_weights=weights).logits.sum().backward()
    layers = [layer for name, layer in model.routed_layers().items() if ".mlp." in name]
    assert all(layer.lora_B["expert_2"].weight.grad is None for layer in layers)
    assert all(layer.lora_B["expert_1"].weight.grad.abs().max() > 0 for layer in layers)


def test_each_token_runs_through_its_top_k_experts_only(load, ids):
    model = load(Recipe(num_experts=8, top_k=3))
    rows = []
    for layer in model.routed_layers().values():
        layer.base_layer.register_forward_pre_hook(lambda module, args: rows.append((id(module), args[0].shape[-2])))
    with torch.no_grad():
        model(ids)
    up = [id(layer.base_layer) for name, layer in model.routed_layers().items() if name.endswith("up_proj")]
    assert [sum(n for module, n in rows if module == one) for one in up] == [3 * ids.numel()] * 2


def test_cached_generation_equals_recomputation(load, ids):
    model = load(Recipe("mixlora-dynamic", num_experts=4))
    mask = padded(ids)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert cached.shape == (3, ids.shape[1] + 5)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert (torch.cat([first.logits, rest], dim=1) - whole).abs().max() < 1e-12


def test_one_hot_weights_are_that_expert_and_zero_deltas_the_base(load, bases, ids):
    model = load(Recipe())
    with torch.no_grad():
        for expert in range(3):
            one_hot = nn.functional.one_hot(torch.full(ids.shape, expert), 3).double()
            alone = model(ids, expert_id=expert).logits
            assert (model(ids, routing_weights=one_hot).logits - alone).abs().max() < 1e-12
            assert (model(ids).logits - alone).abs().max() > 0.1
        for layer in model.routed_layers().values():
            for part in layer.lora_B.values():
                part.weight.zero_()
        base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float64).eval()
        assert (model(ids).logits - base(ids).logits).abs().max() < 1e-12


def test_the_same_weights_given_by_hand_give_the_same_logits(load, ids):
    model = load(Recipe())
    with torch.no_grad():
        chosen = model(ids).logits
        weights = model.last_routing_weights
        assert weights.shape == (*ids.shape, 2, 3)  # two MLPs, three experts
        assert torch.equal(model(ids, routing_weights=weights).logits, chosen)
        same_everywhere = weights[:, :, :1].expand(-1, -1, 2, -1)
        three = model(ids, routing_weights=weights[:, :, 0]).logits
        assert torch.equal(three, model(ids, routing_weights=same_everywhere).logits)
        assert (three - chosen).abs().max() > 0.01
    with pytest.raises(RoutingError, match="for each of 2 routed layers"):
        model(ids, routing_weights=torch.ones(*ids.shape, 6, 3))


def test_permuting_experts_and_weights_together_changes_nothing(load, ids):
    model, order = load(Recipe()), [2, 0, 1]
    permuted = load(Recipe())
    names = model.expert_names
    with torch.no_grad():
        for layer, other in zip(model.routed_layers().values(), permuted.routed_layers().values(), strict=True):
            for new, old in enumerate(order):
                if names[old] in layer.lora_A:
                    for half in ("lora_A", "lora_B"):
                        getattr(other, half)[names[new]].weight.copy_(getattr(layer, half)[names[old]].weight)
        for gate, other in zip(model.router, permuted.router, strict=True):
            other.gate.weight.copy_(gate.gate.weight[order])
        assert (model(ids).logits - permuted(ids).logits).abs().max() < 1e-12
        assert (model(ids, expert_id=0).logits - permuted(ids, expert_id=0).logits).abs().max() > 0.1


def test_given_weights_learn_from_experts_that_they_leave_out(load):
    block = load(Recipe()).causal_lm.model.layers[0].mlp
    x, direction = torch.randn(2, 3, 48).double(), torch.randn(2, 3, 48).double()
    weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(2, 3, 1).requires_grad_()
    with block.mixture.using(weights):
        (block(x) * direction).sum().backward()
    for expert in range(3):
        with block.mixture.using(expert):
            slope = (block(x) * direction).sum(-1)
        assert torch.allclose(weights.grad[..., expert], slope, rtol=1e-12)


def test_weights_that_do_not_sum_to_one_are_not_normalised(load):
    block = load(Recipe()).causal_lm.model.layers[1].mlp
    x = torch.randn(2, 3, 48).double()
    weights = torch.tensor([0.5, 0.0, 0.3], dtype=torch.float64).reshape(1, 1, 3)
    outputs = []
    for expert in range(3):
        with block.mixture.using(expert):
            outputs.append(block(x))
    assert torch.allclose(block.mix(x, weights), 0.5 * outputs[0] + 0.3 * outputs[2], rtol=1e-12, atol=1e-14)


def test_rows_of_a_batch_do_not_depend_on_each_other(load, ids):
    model = load(Recipe(num_experts=4))
    with torch.no_grad():
        together = model(ids).logits
        assert max((model(ids[row : row + 1]).logits - together[row]).abs().max() for row in range(3)) < 1e-12
        assert (model(ids[:, :5]).logits - together[:, :5]).abs().max() < 1e-12


def test_strategies_use_the_experts_alone(load, ids):
    model = load(Recipe())
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(ids, expert_id=expert, **options) for expert in range(3)]
    assert not torch.equal(alone[0], alone[1])
    for expert in range(3):
        assert torch.equal(model.generate(ids, strategy=f"single:{expert}", **options), alone[expert])
    with torch.no_grad():
        losses = torch.stack([torch.stack([model(r[None], labels=r[None], expert_id=e).loss for e in range(3)]) for r in ids])
    best = model.generate(ids, strategy="best", **options)
    for row, expert in enumerate(losses.argmin(-1).tolist()):
        assert torch.equal(best[row], alone[expert][row])
    with torch.no_grad():
        mean = torch.stack([model(ids, expert_id=e).logits[:, -1].softmax(-1) for e in range(3)]).mean(0)
    assert torch.equal(model.generate(ids, strategy="ensemble", **options)[:, ids.shape[1]], mean.argmax(-1))


def test_adapters_off_is_the_base_although_the_weights_do_not_sum_to_one(load, bases, ids):
    model = load(Recipe("mixlora-dynamic", top_p=0.3))
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float64).eval()
    with torch.no_grad():
        assert (model.last_routing_weights is None) and (model(ids).logits - base(ids).logits).abs().max() > 0.1
        assert (model.last_routing_weights.sum(-1) < 0.99).any()
        with model.peft_model.disable_adapter():
            assert torch.equal(model(ids).logits, base(ids).logits)


def test_detaching_gives_the_blocks_back(load, ids):
    model = load(Recipe())
    blocks = [layer.mlp for layer in model.causal_lm.model.layers]
    names = list(model.peft_model.state_dict())
    assert all(isinstance(block, RoutedFeedForward) for block in blocks)
    model.train()
    peft_model = detach_router(model)
    assert list(peft_model.state_dict()) == names
    for block, layer in zip(blocks, peft_model.get_base_model().model.layers, strict=True):
        assert layer.mlp is block.source[0] and type(layer.mlp) is LlamaMLP and layer.mlp.training
    assert not any("Routed" in type(module).__name__ for module in peft_model.modules())


def test_a_copy_routes_by_itself(load, ids):
    model = load(Recipe())
    with torch.no_grad():
        before = model(ids).logits
        twin = copy.deepcopy(model)
        for layer in twin.routed_layers().values():
            for part in layer.lora_B.values():
                part.weight.zero_()
        assert torch.equal(model(ids).logits, before)
        assert (twin(ids).logits - before).abs().max() > 0.1


def test_bfloat16_is_no_further_from_float64_than_the_base_is(bases, load, ids):
    recipe = Recipe(top_k=3)  # all experts, so that no rounding changes who is chosen
    with torch.no_grad():
        got = load(recipe, dtype=torch.bfloat16)(ids).logits
        exact = {
            d: AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=d).eval()(ids).logits
            for d in (torch.bfloat16, torch.float64)
        }
    error = (got.double() - wanted(bases["llama"], recipe, ids, torch.ones_like(ids))).abs().mean()
    assert got.dtype == torch.bfloat16
    assert 0 < error < 2 * (exact[torch.bfloat16].double() - exact[torch.float64]).abs().mean()


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "loramoe", "mola"])
def test_saved_natively_and_loaded_again_it_is_bitwise_the_same(load, ids, tmp_path, strategy):
    model = load(Recipe(strategy), dtype=torch.float32)
    model.save_pretrained(tmp_path / "native")
    again = load_checkpoint(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.checkpoint.format == "dylo-moe" and again.moe_config.routing_level == model.moe_config.routing_level
    assert again.checkpoint.router.activation == model.checkpoint.router.activation
    assert (again.checkpoint.router.activation == "silu") == strategy.startswith("mixlora")


def test_another_activation_than_the_base_has_is_refused(bases, tmp_path):
    write_moe_peft(tmp_path, bases["llama"], Recipe(act_fn="swish", safetensors=True))
    load_checkpoint(tmp_path)  # another name of silu
    write_moe_peft(tmp_path, bases["llama"], Recipe(act_fn="gelu", safetensors=True))
    with pytest.raises(
        CheckpointError, match=r"act_fn: found 'gelu', which is not the activation of the base model's model\.layers\.0\.mlp"
    ):
        load_checkpoint(tmp_path)


def test_what_is_no_feed_forward_block_is_refused(load, bases):
    source = load(Recipe(targets=("gate_proj", "down_proj", "up_proj"))).checkpoint
    expert = source.experts[0]
    attention = replace(expert, modules={"model.layers.0.self_attn.q_proj": expert.modules["model.layers.0.mlp.up_proj"]})
    pair = attention.modules["model.layers.0.self_attn.q_proj"]
    square = replace(attention, modules={"model.layers.0.self_attn.q_proj": replace(pair, lora_B=pair.lora_B[:48])})
    peft_model = add_experts(AutoModelForCausalLM.from_pretrained(bases["llama"]), (square,))
    with pytest.raises(RoutingError, match="LlamaAttention cannot be mixed as a whole"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=1, routing_level="feed_forward"))


def test_a_block_outside_of_its_model_refuses_to_run(load):
    block = load(Recipe()).causal_lm.model.layers[0].mlp
    with pytest.raises(RoutingError, match="outside of its model's forward"):
        block(torch.randn(1, 2, 48))


def test_the_reference_keeps_the_expert_that_exceeds_the_threshold():
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    recipe = Recipe("mixlora-dynamic", top_p=0.5)
    assert torch.allclose(gate_weights(logits, recipe), torch.tensor([[0.5, 0.3, 0.0]], dtype=torch.float64))
