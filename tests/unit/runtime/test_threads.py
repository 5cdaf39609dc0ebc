"""Two threads with one model: whatever one does, passes and generations of the other are those of a thread alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event, get_ident

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dylo_moe import load_checkpoint
from dylo_moe.guessing import Guesses
from tests.unit.runtime.price import Always

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def interleaved(monkeypatch, first, second, *, call: int) -> list:
    """Results of two calls in threads of their own: the first stops in the middle, the second does, the first goes on to its
    end, and then the second does. call: of a decoder layer in each thread, counted from 1, in which it stops."""
    calls: dict[int, int] = {}
    places: dict[int, int] = {}
    arrived, may_go_on = [Event(), Event()], [Event(), Event()]
    forward = LlamaDecoderLayer.forward

    def stopping(self, *args, **kwargs):  # in the class: a hook would be a user's code
        me = get_ident()
        calls[me] = calls.get(me, 0) + 1
        if me in places and calls[me] == call:
            arrived[places[me]].set()
            may_go_on[places[me]].wait(20)
        return forward(self, *args, **kwargs)

    def run(place, function):
        places[get_ident()] = place
        try:
            return function()
        finally:
            arrived[place].set()

    monkeypatch.setattr(LlamaDecoderLayer, "forward", stopping)
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for place, function in enumerate((first, second)):
            futures.append(pool.submit(run, place, function))
            arrived[place].wait(20)
        results = []
        for place, future in enumerate(futures):
            may_go_on[place].set()
            results.append(future.exception(20) or future.result())
    monkeypatch.undo()
    return results


@pytest.mark.parametrize("call", [2, 3, 8])
def test_generations_with_different_experts_are_those_of_each_alone(specimens, ids, monkeypatch, call):
    model = load_checkpoint(specimens(features="layer", targets="attention")).eval()
    calls = [lambda: model.generate(ids, strategy="single:0", **GREEDY), lambda: model.generate(ids, expert_id=1, **GREEDY)]
    wanted = [function() for function in calls]
    assert not torch.equal(*wanted)
    assert all(map(torch.equal, interleaved(monkeypatch, *calls, call=call), wanted))


@pytest.mark.parametrize("features", ["base", "embedding", "layer"])
def test_passes_of_different_lengths_are_those_of_each_alone(specimens, ids, monkeypatch, features):
    model = load_checkpoint(specimens(features=features, targets="attention")).eval()
    calls = [lambda: model(ids).logits.detach(), lambda: model(ids[:, :5]).logits.detach()]
    wanted = [function() for function in calls]
    assert all(map(torch.equal, interleaved(monkeypatch, *calls, call=2), wanted))


@pytest.mark.parametrize(("call", "other"), [(4, {}), (6, {}), (7, {"expert_id": 1}), (7, {})])
def test_guesses_of_one_generation_get_nothing_of_the_other(specimens, ids, monkeypatch, call, other):
    model = load_checkpoint(specimens(top_k=2), dtype=torch.float64).eval()
    model.routing.pair_cost = Always()
    calls = [lambda: model.generate(ids[:2], **GREEDY), lambda: model.generate(ids[2:], **other, **GREEDY)]
    wanted = [function() for function in reversed(calls)][::-1]
    assert model.routing.guesses.made
    assert all(map(torch.equal, interleaved(monkeypatch, *calls, call=call), wanted))


def test_active_expert_is_the_models_and_holds_in_every_thread(specimens, ids):
    model = load_checkpoint(specimens()).eval()
    model.expert_manager.set_active_expert(2)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(lambda: model(ids).logits.detach()).result()
    assert torch.equal(got, model(ids, expert_id=2).logits)


def test_hidden_states_of_another_threads_pass_are_not_a_guesss(specimens):
    model = load_checkpoint(specimens(targets="attention")).eval()
    guesses = Guesses(model.causal_lm, model.mixture, 0.0, Always())
    output = BaseModelOutput(last_hidden_state=torch.zeros(1, 1, 2))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(guesses._catch, model.causal_lm, (), output).result()
    assert not guesses._caught
    guesses._catch(model.causal_lm, (), output)
    assert guesses._caught
