"""A generation with a compiled forward and a static cache: no graph breaks, and nothing is compiled for each token."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from dylo_moe import load_checkpoint

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
        assert counters["stats"]["unique_graphs"] <= 2
