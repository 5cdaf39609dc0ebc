"""MoE-PEFT's mixlora-switch in both of its readings, against its equation in float64, text by text and without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from dylo_moe import MoELoraConfig, PeftMoEDecoder, attach_router, detach_router, load_checkpoint
from dylo_moe.completions import Wanted
from dylo_moe.errors import RoutingError
from dylo_moe.row_routes import RowRoutes
from fixtures.moe_peft import Recipe, adapter_tensors, write_moe_peft
from fixtures.moe_peft_equation import reference_model
from harness.oracles import feed_forward, mixture
from harness.specimens import write_base

RECIPE = Recipe("mixlora-switch", expert_capacity=2, safetensors=True)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def load(base, tmp_path):
    """Our model in float64: of RECIPE, "training", unless said otherwise."""

    def loaded(recipe: Recipe = RECIPE, reading: str = "training"):
        write_moe_peft(tmp_path / "checkpoint", base, recipe)
        return load_checkpoint(tmp_path / "checkpoint", mixlora_switch=reading).double()

    return loaded


def wanted(base: Path, recipe: Recipe, reading: str) -> nn.Module:
    """The published equation, in place in a plain model of the base."""
    model = reference_model(base, recipe, {k: tensor.double() for k, tensor in adapter_tensors(recipe, base).items()})
    for layer in model.model.layers if reading == "inference" else ():
        layer.mlp = nn.Identity()
    return model


def padded(ids: torch.Tensor, side: str) -> torch.Tensor:
    """Masks for 0, 3 and 6 tokens of padding."""
    left = torch.arange(ids.shape[1]) >= torch.tensor([[0], [3], [6]])
    return (left if side == "left" else left.flip(1)).long()


@pytest.mark.parametrize(
    ("reading", "recipe"),
    [
        ("training", RECIPE),
        ("training", Recipe("mixlora-switch", num_experts=4, expert_capacity=1, use_rslora=True, safetensors=True)),
        ("training", Recipe("mixlora-switch", expert_capacity=32, targets=("q_proj", "down_proj"), safetensors=True)),
        ("inference", RECIPE),
        ("inference", Recipe("mixlora-switch", targets=("gate_proj", "up_proj"), safetensors=True)),
    ],
    ids=["two tokens each", "one token each", "room for all", "inference", "inference without attention"],
)
@torch.no_grad()
def test_each_row_of_a_padded_batch_equals_the_equation_on_its_text_alone(base, load, ids, reading, recipe):
    model, equation = load(recipe, reading), wanted(base, recipe, reading)
    for mask in (padded(ids, "left"), padded(ids, "right")):
        got = model(ids, attention_mask=mask).logits
        for row in range(3):
            text = ids[row, mask[row].bool()][None]
            assert (got[row, mask[row].bool()] - equation(text).logits[0]).abs().max() < 1e-11
        assert (got - model(ids, attention_mask=mask, expert_id=0).logits)[mask.bool()].abs().max() > 0.1


@torch.no_grad()
def test_a_block_equals_the_oracle_where_its_capacity_is_reached_and_where_not(load, ids):
    model, seen = load(), {}
    for number, layer in enumerate(model.causal_lm.model.layers):
        layer.mlp.register_forward_hook(lambda _, args, output, n=number: seen.update({n: (args[0], output)}))
    model(ids)
    handed_on = 0
    for number, (x, output) in seen.items():
        network = oracle_of(model, f"model.layers.{number}.mlp.")
        for row, weights in enumerate(model.last_routing_weights[:, :, number].numpy()):
            want = feed_forward.switch(network, x[row].numpy(), weights, "training", RECIPE.expert_capacity)
            assert np.abs(output[row].numpy() - want).max() < 1e-12
            assert ((weights > 0).sum(-1) == 1).all() and (weights.max(-1) < 1).all()
            handed_on += sum(max(0, n - RECIPE.expert_capacity) for n in (weights > 0).sum(0))
    assert 0 < handed_on < 2 * ids.numel()


def oracle_of(model, place: str) -> feed_forward.FeedForward:
    layers = model.routed_layers()

    def linear(name: str) -> mixture.Layer:
        layer = layers[place + name]
        halves = [
            tuple(half[name].weight.detach().numpy() for name in model.expert_names) for half in (layer.lora_A, layer.lora_B)
        ]
        scalings = tuple(layer.scaling[name] for name in model.expert_names)
        return mixture.Layer(layer.base_layer.weight.detach().numpy(), None, *halves, scalings)

    return feed_forward.FeedForward(linear("gate_proj"), linear("up_proj"), linear("down_proj"), feed_forward.silu)


def test_gradients_equal_the_equation(base, load):
    ids = torch.randint(5, 300, (3, 9))
    tensors = {k: t.double().requires_grad_() for k, t in adapter_tensors(RECIPE, base).items()}
    found = []
    for checkpointed in (False, True):
        model = load().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        mask = padded(ids, "left")
        logits = model(ids, attention_mask=mask).logits
        if checkpointed:
            model.eval()(ids)  # another pass before backward(), with another mask
            model.train()
        logits[mask.bool()].square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    equation = reference_model(base, RECIPE, tensors)
    sum(equation(ids[row, mask[row].bool()][None]).logits.square().sum() for row in range(3)).backward()
    for number, gate in enumerate(model.router):
        want = tensors[f"mixlora.layers.{number}.mlp.moe_gate.weight"].grad
        assert (gate.gate.weight.grad - want).abs().max() < 1e-9 * want.abs().max()
    up = model.routed_layers()["model.layers.1.mlp.up_proj"]
    for expert in range(3):
        want = tensors[f"mixlora.layers.1.mlp.up_proj.experts.{expert}.lora_B.weight"].grad
        assert (up.lora_B[f"expert_{expert}"].weight.grad - want).abs().max() < 1e-9 * want.abs().max()
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-9, atol=1e-12) for name in found[0])


@pytest.mark.parametrize("reading", ["training", "inference"])
def test_generation_with_a_cache_asked_for_equals_recomputation(base, load, ids, reading):
    model, equation, text = load(reading=reading), wanted(base, RECIPE, reading), ids[:1]
    for _ in range(GREEDY["max_new_tokens"]):
        text = torch.cat([text, equation(text).logits[:, -1:].argmax(-1)], dim=1)
    for options in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids[:1], **GREEDY, **options), text)
    beams = [model.generate(ids, num_beams=3, use_cache=use, **GREEDY) for use in (True, False)]
    assert torch.equal(*beams)


def test_rows_of_a_padded_generation_are_those_of_each_prompt_alone(load, ids):
    model, mask = load(), padded(ids, "left")
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row, mask[row].bool()][None], **GREEDY)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, -6:])


def test_as_trained_there_is_no_cache_and_as_in_inference_there_is(load, ids):
    model = load()
    with pytest.raises(RoutingError, match="use_cache=False"):
        model(ids, past_key_values=DynamicCache())
    assert model(ids, use_cache=True).past_key_values is None
    assert model(ids, use_cache=True, expert_id=1).past_key_values is not None
    assert load(reading="inference")(ids, use_cache=True).past_key_values is not None


def test_what_padding_is_cannot_be_told_from_a_mask_of_another_shape(load, ids):
    square = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    model = load()
    model(ids, attention_mask=square, expert_id=0)
    with pytest.raises(RoutingError, match=r"should be \(rows, tokens\)"):
        model(ids, attention_mask=square)
    with (
        pytest.raises(RoutingError, match="no rows of single experts"),
        model.routing.forcing(RowRoutes([None, 1, 0], 3, model.device)),
    ):
        model.causal_lm(ids)


def test_what_the_decoder_writes_is_what_each_prompt_gets_alone(base, load):
    model = load().float()
    options = {"batch_size": 4, "temperature": 0.0, "max_new_tokens": 4, "dtype": "float32", "model": model}
    decoder = PeftMoEDecoder("x", "humaneval", base_model=str(base), **options)
    prompts = ["def add(a, b):", "import os"]
    wanted_ = [Wanted(prompt, "router", 0) for prompt in prompts]
    texts = {done.wanted.prompt: done.text for done in decoder.complete_many(wanted_, do_sample=False)}
    for prompt in prompts:
        ids = decoder.encode(prompt)
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert texts[prompt] == decoder.tokenizer.decode(new, skip_special_tokens=True).replace("\t", "    ")


@pytest.mark.parametrize("reading", ["training", "inference"])
def test_saved_natively_the_reading_is_recorded_and_may_be_changed(load, ids, tmp_path, reading):
    model, other = load(reading=reading).float(), {"training": "inference", "inference": "training"}[reading]
    model.save_pretrained(tmp_path / "native")
    again, changed = load_checkpoint(tmp_path / "native"), load_checkpoint(tmp_path / "native", mixlora_switch=other)
    assert again.checkpoint.router.mixlora_switch == reading and changed.checkpoint.router.mixlora_switch == other
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(changed(ids).logits, load(reading=other).float()(ids).logits)
        assert (changed(ids).logits - again(ids).logits).abs().max() > 0.1


def test_experts_of_an_inference_have_no_effect_but_where_they_are_named(load, ids):
    model = load(reading="inference")
    with torch.no_grad():
        routed, alone = model(ids).logits, model(ids, expert_id=1).logits
        for name, layer in model.routed_layers().items():
            for expert in model.expert_names if ".mlp." in name else ():
                layer.lora_B[expert].weight.mul_(3)
        assert torch.equal(model(ids).logits, routed)
        assert (model(ids, expert_id=1).logits - alone).abs().max() > 0.1


def test_the_adapters_off_are_the_base(base, load, ids):
    model, plain = load(reading="inference"), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad(), model.peft_model.disable_adapter():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_gate_that_hands_on_cannot_route_a_linear(load):
    model = load()
    router, peft_model = model.router, detach_router(model)
    config = MoELoraConfig(num_experts=3, router_type="gates", router_features="layer", shared_adapter="shared")
    with pytest.raises(RoutingError, match="need 'feed_forward'"):
        attach_router(peft_model, router, config)
