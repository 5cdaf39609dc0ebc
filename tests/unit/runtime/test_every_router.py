"""One format of each kind of router, however it is generated with, copied and moved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dylo_moe import load_checkpoint
from fixtures.adamole import write_adamole
from fixtures.gated import draw
from fixtures.moe_peft import Recipe, write_moe_peft
from fixtures.mola import write_mola
from harness.specimens import XLoraChoices, write_base, write_xlora_checkpoint

IDS = torch.tensor([[5, 9, 33, 5, 9, 33], [8, 2, 60, 8, 2, 60]])
LAYERWISE = XLoraChoices(layerwise_scalings=True, xlora_depth=2, top_k_lora=2, enable_softmax_topk=True)
WRITERS = {
    "a threshold per layer": lambda path, base: write_adamole(path, draw(base, ("q_proj",)), pickled=False, max_threshold=None),
    "whole MLPs": lambda path, base: write_moe_peft(path, base, Recipe("mixlora", safetensors=True)),
    "fewer experts in a layer": lambda path, base: write_mola(
        path, draw(base, ("q_proj",), experts=(2, 3), ranks=(4, 4)), pickled=False
    ),
    "a classifier per layer": lambda path, base: write_xlora_checkpoint(path, base, num_experts=3, choices=LAYERWISE),
}
GENERATIONS = {
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "seeded samples of every expert in turn": {
        "strategy": "round_robin",
        "do_sample": True,
        "num_return_sequences": 2,
        "seeds": [3, 1, 4, 1],
    },
}


@pytest.fixture(scope="module", params=WRITERS)
def model(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("router")
    base = write_base(root / "llama", "llama")
    options = {"top_k": 2} if request.param == "fewer experts in a layer" else {}
    WRITERS[request.param](root / "checkpoint", base)
    return load_checkpoint(root / "checkpoint", str(base), **options)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_with_a_cache_equals_recomputation(model, name):
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, **GENERATIONS[name]}
    rows = IDS[:1] if name == "prompt lookup" else IDS
    plain = {key: value for key, value in options.items() if key not in ("cache_implementation", "prompt_lookup_num_tokens")}
    assert torch.equal(model.generate(rows, **options), model.generate(rows, **plain, use_cache=False))


def test_its_own_weights_given_back_give_the_same_logits(model):
    wanted = logits(model)
    with torch.no_grad():
        got = model(IDS, routing_weights=model.last_routing_weights).logits
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_copies_are_the_same_and_their_own(model):
    wanted = logits(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(made), wanted)
        state = copy.deepcopy(made.state_dict())
        for parameter in made.parameters():
            parameter.data.mul_(1.5)
        assert not torch.equal(logits(made), wanted) and torch.equal(logits(model), wanted)
        made.load_state_dict(state)
        assert torch.equal(logits(made.to(torch.float64).to(torch.float32)), wanted)
