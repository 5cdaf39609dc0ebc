"""Calls inside of a generation, and calls that end in the middle: neither changes what the next one computes."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dylo_moe import load_checkpoint
from tests.unit.runtime.price import Always
from tests.unit.runtime.test_threads import GREEDY


class Asking(LogitsProcessor):
    """A user's callback that calls the model it is called by."""

    def __init__(self, ask):
        self.ask, self.answers = ask, []

    def __call__(self, input_ids, scores):
        self.answers.append(self.ask())
        return scores


@pytest.mark.parametrize("outer", [{"strategy": "single:1"}, {"strategy": "base"}, {"expert_id": 1}, {"strategy": "ensemble"}])
def test_a_call_inside_a_generation_has_the_route_that_it_asks_for(specimens, ids, outer):
    model, few = load_checkpoint(specimens(targets="attention")).eval(), {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    wanted, logits = model.generate(ids, **few), model(ids).logits
    plain = model.generate(ids, **outer, **few)
    asking = Asking(lambda: (model.generate(ids, **few), model(ids).logits))
    assert torch.equal(model.generate(ids, logits_processor=[asking], **outer, **few), plain)
    assert not torch.equal(wanted, plain)
    for tokens, found in asking.answers:
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(found, logits)


def interrupting(monkeypatch, call: int):
    """Ctrl-C in this call of a decoder layer."""
    calls = []
    forward = LlamaDecoderLayer.forward

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", interrupted)


@pytest.mark.parametrize("call", [1, 3, 6, 8])
@pytest.mark.parametrize("features", ["base", "layer"])
def test_after_an_interrupted_generation_nothing_is_left(specimens, ids, monkeypatch, features, call):
    model = load_checkpoint(specimens(features=features, targets="attention"), dtype=torch.float64).eval()
    model.routing.pair_cost = Always()
    wanted = model.generate(ids, **GREEDY)
    interrupting(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **GREEDY)
    monkeypatch.undo()
    assert not model.mixture.active
    assert model.mixture.held is None
    assert not model.causal_lm.base_model._forward_hooks
    assert torch.equal(model.generate(ids, **GREEDY), wanted)


def test_after_an_interrupted_pass_no_layer_runs_on_its_route(specimens, ids, monkeypatch):
    model = load_checkpoint(specimens(targets="attention")).eval()
    interrupting(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    assert not model.mixture.active
