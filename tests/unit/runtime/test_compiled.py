"""A generation with a compiled forward and a static cache: one graph for the prompt, one for every token after it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from dylo_moe import load_checkpoint

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["embedding", "layer"])
def model(request, specimens):
    return load_checkpoint(specimens(features=request.param, targets="attention")).eval()


def test_compiled_generation_breaks_no_graph_and_compiles_nothing_per_token(model, ids):
    wanted = model.generate(ids, **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    # The eager backend captures the same graphs as any other.
    model.causal_lm.forward = torch.compile(model.causal_lm.forward, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(model.generate(ids, cache_implementation="static", **OPTIONS), wanted)
        assert counters["stats"]["unique_graphs"] == 2
