"""A generation with a compiled forward and a static cache: no graph breaks, and nothing is compiled for each token."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from dylo_moe import load_checkpoint
from dylo_moe.spread import Spread

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
STATIC = {**OPTIONS, "cache_implementation": "static"}


def test_generation_with_a_compiled_forward_has_one_graph_for_the_prompt_and_one_for_all_tokens(specimens, ids):
    model = load_checkpoint(specimens(features="layer", targets="attention")).eval()
    wanted = model.generate(ids, **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    # The eager backend captures the same graphs as any other.
    model.causal_lm.forward = torch.compile(model.causal_lm.forward, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(model.generate(ids, **STATIC), wanted)
        assert counters["stats"]["unique_graphs"] == 2


def test_generation_that_transformers_compiles_follows_a_changed_weight(specimens, ids):
    """As on a GPU, where transformers compiles each step of a static cache, with the hooks around the forward."""
    model = load_checkpoint(specimens(features="base", targets="attention", top_k=4)).eval()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    for factor in (1, -3, 0.5, 2):
        with torch.no_grad():
            for layer in model.routed_layers().values():
                layer.lora_B[model.expert_names[1]].weight.mul_(factor)
        wanted = model.generate(ids, **OPTIONS)
        assert torch.equal(model.generate(ids, **STATIC, compile_config=compiled), wanted)
        assert 1 <= counters["stats"]["unique_graphs"] <= 2


def compiled_steps(model, ids) -> tuple[torch.Tensor, list[torch.fx.Node]]:
    """What it generates, and a step's graph."""
    made = []

    def backend(graph, inputs):  # a function: transformers copies everything else
        made.append(list(graph.graph.nodes))
        return graph

    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    return model.generate(ids, **STATIC, compile_config=compiled), max(made, key=len)


@pytest.mark.parametrize("features", ["embedding", "base", "layer"])
def test_a_compiled_step_stacks_nothing_and_makes_no_tensor_of_numbers(specimens, ids, features):
    """On a GPU such a tensor comes from the host in each step, which no CUDA graph holds."""
    model = load_checkpoint(specimens(features=features, targets="attention", top_k=4)).eval()
    got, nodes = compiled_steps(model, ids)
    assert torch.equal(got, model.generate(ids, **OPTIONS))
    assert not any(node.target is torch.tensor for node in nodes)
    joined = [node for node in nodes if node.target is torch.cat]
    assert joined and not any(part.op == "placeholder" for node in joined for part in node.all_input_nodes)


def test_a_compiled_step_multiplies_by_the_a_of_q_k_and_v_at_once(specimens, ids):
    model = load_checkpoint(specimens(features="embedding", targets="attention", top_k=4)).eval()
    got, nodes = compiled_steps(model, ids)
    products = [node for node in nodes if node.target is torch.mm]
    assert len(products) == 2 * model.causal_lm.config.num_hidden_layers  # the other one is the output projection's
    assert torch.equal(got, model.generate(ids, **OPTIONS))


class Doubling(torch.nn.Module):
    """Gives what is inside twice the input."""

    __module__ = "transformers.doubling"  # code of somebody unknown keeps no stacks

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(2 * x)


@pytest.mark.parametrize(("name", "products"), [("q_proj", 3), ("k_proj", 4), ("v_proj", 3)])
def test_siblings_that_read_different_tensors_in_a_compiled_step_use_their_own(specimens, ids, name, products):
    model = load_checkpoint(specimens(features="embedding", targets="attention", top_k=4)).eval()
    for block in model.causal_lm.model.layers:
        setattr(block.self_attn, name, Doubling(getattr(block.self_attn, name)))
    got, nodes = compiled_steps(model, ids)
    assert sum(node.target is torch.mm for node in nodes) == products * model.causal_lm.config.num_hidden_layers
    with torch.enable_grad():  # the long way, in which every layer is alone
        wanted = model(got[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(got[:, ids.shape[1] :], wanted)


@pytest.mark.parametrize(
    "signature",
    [
        ((0, 2.0, 4), (1, 2.0, 4), (2, 2.0, 4)),
        ((0, 2.0, 4), (2, 2.0, 4)),  # an expert that the layer lacks
        ((0, 2.0, 4), (1, 0.5, 4), (2, 0.5, 3), (3, 0.5, 3)),
        ((3, 0.1, 8),),
    ],
)
def test_factors_in_a_graph_are_those_outside(signature):
    weights = torch.rand(2, 1, 4)
    found = torch.compile(lambda given: Spread(given, (2, 5), {}).factors(signature), fullgraph=True, backend="eager")(weights)
    assert torch.equal(found, Spread(weights, (2, 5), {}).factors(signature))
