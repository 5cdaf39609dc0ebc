"""Guesses of several tokens: the logits of two separate passes for each token, by fewer passes than tokens."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import wraps

import pytest
import torch

from dylo_moe import PeftMoEDecoder, pair_cost
from dylo_moe.pair_cost import PairCost, tokens_of_use
from tests.unit.runtime.price import Always
from tests.unit.runtime.test_guessing import CHANGES, GREEDY, Run, assert_same, model_of

STEPS = 16
WIDTHS = [2, 3, 5]


@contextmanager
def shapes_of_passes(model):
    seen = []

    def look(module, args, output):
        seen.append(tuple(output.last_hidden_state.shape[:2]))

    handle = model.causal_lm.base_model.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def model_with(specimens, width, **options):
    # All of it in float64: where something rounds to float32 it shows in which order a product of another size adds.
    model = model_of(specimens, family="gpt2", cost=Always(width), **options)
    model.router.double()
    return model


@pytest.fixture
def ids():
    """Prompts that repeat themselves, (3, 27)."""
    return torch.randint(5, 300, (3, 9)).repeat(1, 3)


def repeated(ids, steps=STEPS):
    """What such a prompt goes on with, (rows, steps)."""
    return ids[:, :9].repeat(1, 1 + steps // 9)[:, :steps]


def run(model, ids, tokens, mask=None, change=None, at=None):
    with model.routing.holding(model, {}), shapes_of_passes(model) as passes:
        found = Run(model, ids, mask)
        for index, column in enumerate(tokens.T):
            if index == at:
                change(found)
            found.step(column[:, None])
    return torch.stack(found.logits), passes


def assert_as_two_passes(model, *given, **changed):
    found, passes = run(model, *given, **changed)
    guesses, cost = model.routing.guesses, model.routing.pair_cost
    model.routing.pair_cost = None
    wanted, _ = run(model, *given, **changed)
    model.routing.pair_cost = cost
    assert_same(found, wanted)
    return guesses, passes


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_text_that_repeats_itself_takes_fewer_passes_than_tokens(specimens, ids, width, rows):
    model, ids = model_with(specimens, width), ids[:rows]
    guesses, passes = assert_as_two_passes(model, ids, repeated(ids, 4 * width))
    assert guesses.made == guesses.right == 4 * (width - 1)
    assert passes == [(rows, 27)] * 2 + [(rows, width)] * 8


@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_wrong_guess_at_any_place_is_replaced(specimens, ids, width, place):
    model = model_with(specimens, width)
    text = repeated(ids)
    text[1, place] = (text[1, place] + 1) % 300
    guesses, _ = assert_as_two_passes(model, ids, text)
    assert guesses.right > guesses.made - guesses.right


@pytest.mark.parametrize("width", WIDTHS)
def test_guesses_that_are_always_wrong_are_replaced(specimens, ids, width):
    text = repeated(ids)
    text[1, 1::2] = (text[1, 1::2] + torch.arange(1, 1 + STEPS // 2)) % 300
    guesses, _ = assert_as_two_passes(model_with(specimens, width), ids, text)
    assert guesses.right == 0 < guesses.made


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_with_padding_are_guessed(specimens, ids, width):
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    guesses, _ = assert_as_two_passes(model_with(specimens, width), ids, repeated(ids), mask)
    assert guesses.right == guesses.made > STEPS // 3


@pytest.mark.parametrize("at", range(3, 9))
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_used_after_the_cache_or_the_step_has_become_another(specimens, ids, change, at):
    model, text = model_with(specimens, 3), repeated(ids)
    assert_as_two_passes(model, ids, text, change=change, at=at)
    changed, _ = run(model, ids, text, change=change, at=at)
    untouched, _ = run(model, ids, text)
    assert (changed - untouched)[-1].abs().max() > 1e-3 * changed.abs().max()


@pytest.mark.parametrize("length", range(20, 25))
def test_what_was_found_is_kept_when_the_cache_needs_more_room(specimens, ids, length):
    model = model_with(specimens, 5)
    guesses, _ = assert_as_two_passes(model, ids[:1, :length], repeated(ids[:1].roll(-length, dims=1), 100))
    assert guesses.right == guesses.made > 50


@pytest.mark.parametrize("features", ["base", "all_experts"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generated_tokens_and_cache_are_those_of_two_passes(specimens, ids, features, rows):
    model = model_with(specimens, 3, features=features, experts=0.3)
    ids, mask = ids[:rows], torch.ones_like(ids[:rows])
    mask[-1, :2] = rows == 1
    options = {**GREEDY, "max_new_tokens": 40, "min_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}
    got = model.generate(ids, attention_mask=mask, **options)
    assert model.routing.guesses.right > 10
    model.routing.pair_cost = None
    wanted = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same(torch.stack(got.logits), torch.stack(wanted.logits), torch.float32)  # transformers rounds them
    assert len(got.past_key_values.layers) == len(wanted.past_key_values.layers)
    for here, there in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert_same(here.keys, there.keys)
        assert_same(here.values, there.values)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen"])
def test_other_families_write_what_they_write_in_two_passes(specimens, ids, family):
    model = model_of(specimens, family=family, cost=Always(4), experts=0.3)
    options = {**GREEDY, "max_new_tokens": 40, "min_new_tokens": 40}
    got = model.generate(ids[:1], **options)
    assert model.routing.guesses.right
    model.routing.pair_cost = None
    assert torch.equal(got, model.generate(ids[:1], **options))


def test_weights_of_the_last_step_are_those_of_its_own_token(specimens, ids):
    model, text = model_with(specimens, 3), repeated(ids)
    weights = []
    for cost in (Always(3), None):
        model.routing.pair_cost = cost
        with model.routing.holding(model, {}):
            found = Run(model, ids)
            for column in text.T:
                found.step(column[:, None])
                weights.append(model.last_routing_weights)
    assert all(found.shape == (3, 1, model.num_experts) for found in weights)
    for found, wanted in zip(weights[:STEPS], weights[STEPS:], strict=True):
        assert_same(found, wanted, torch.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_decoder_writes_what_it_writes_in_two_passes(specimens, temperature):
    model, texts = model_with(specimens, 3, experts=0.3), []
    for cost in (Always(3), None):
        model.routing.pair_cost = cost
        options = {"model": model, "temperature": temperature, "max_new_tokens": 40, "batch_size": 3, "force_base_prompt": True}
        decoder = PeftMoEDecoder("x", "humaneval", **options)
        texts.append(decoder.codegen("def f(x):\n" * 6, do_sample=temperature > 0, num_samples=3 if temperature else 1))
        assert cost is None or model.routing.guesses.right
    assert texts[0] == texts[1]


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_tokens_of_use_are_those_before_the_first_wrong_one(width, chance):
    right = torch.rand(100_000, width, generator=torch.Generator().manual_seed(1)) < chance
    found = 1 + right[:, : width - 1].long().cumprod(dim=1).sum(dim=1)
    assert tokens_of_use(width, chance) == pytest.approx(found.double().mean().item(), rel=0.01)


def test_widths_follow_prices_and_chances(specimens):
    cost, threads = PairCost(model_of(specimens).causal_lm), torch.get_num_threads()

    def widths(*prices, widest=16):
        cost._measured = {(1, rows, torch.float64, threads): price for rows, price in zip(pair_cost.WIDTHS, prices, strict=True)}
        return [cost.width(1, chance, repeats, widest) for chance, repeats in ((1.0, 0.0), (0.99, 0.99), (0.8, 0.6), (0.1, 0.1))]

    assert widths(1.0, 1.1, 2.0, 2.1, 3.0, 4.0) == [1, 16, 3, 0]
    assert widths(1.0, 1.1, 2.0, 2.1, 3.0, 9.0) == [1, 6, 3, 0]
    assert widths(2.0, 3.0, 4.0, 6.0, 8.0, 16.0) == [0, 0, 0, 0]
    assert widths(1.0, 1.0, 1.0, 1.0, 1.0, 1.0) == [1, 16, 16, 0]
    assert widths(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, widest=5) == [1, 4, 4, 0]


class Wide:
    """The widest pass pays, if it may be."""

    def width(self, rows, chance, repeats, widest):
        return max(1, widest)


@pytest.mark.parametrize("wrong", [1, 2, 3, 5])
def test_wrong_rows_are_at_most_as_many_as_tokens_and_half_the_prompts(specimens, ids, wrong):
    model, text = model_with(specimens, 1), repeated(ids[:1], 60)
    model.routing.pair_cost = Wide()
    text[0, ::wrong] = torch.randperm(300, generator=torch.Generator().manual_seed(3))[: len(text[0, ::wrong])]
    _, passes = assert_as_two_passes(model, ids[:1], text)
    rows = sum(batch * tokens for batch, tokens in passes[2:])
    assert rows <= 3 * 60 + 27 // 2
    assert wrong < 3 or max(tokens for _, tokens in passes[2:]) > 3


@pytest.mark.parametrize("width", [1, 3])
def test_a_pass_without_a_cache_between_steps_gets_nothing_of_them(specimens, ids, width):
    model, text = model_with(specimens, width), repeated(ids)
    with torch.no_grad():
        wanted = model.causal_lm(ids[:, :5], use_cache=False).logits

    def look(found):
        assert_same(model.causal_lm(ids[:, :5], use_cache=False).logits, wanted)

    for at in range(2, 7):
        with torch.no_grad():
            assert_as_two_passes(model, ids, text, change=look, at=at)


def test_right_rows_do_not_count(specimens, ids):
    model, text = model_with(specimens, 1), repeated(ids[:1], 60)
    model.routing.pair_cost = Wide()
    _, passes = assert_as_two_passes(model, ids[:1], text)
    assert len(passes[2:]) <= 10, "wider and wider"


def test_guesses_begin_again_where_the_text_starts_to_repeat_itself(specimens, ids):
    model, ids = model_with(specimens, 1), ids[:1, :9]
    model.routing.pair_cost = cost = PairCost(model.causal_lm)
    threads = torch.get_num_threads()
    cost._measured = {(1, times, torch.float64, threads): 1.05 if times == 2 else 99.0 for times in pair_cost.WIDTHS}
    unlike = torch.randperm(300, generator=torch.Generator().manual_seed(2))[None, :14]
    guesses, _ = assert_as_two_passes(model, ids, torch.cat([unlike, torch.tensor([[11, 7, 5]]).repeat(1, 20)], dim=1))
    assert guesses.made - guesses.right < 12
    assert guesses.right > 15


def test_forward_is_the_models_own_again_after_a_generation(specimens, ids):
    model = model_with(specimens, 3)
    before = dict(vars(model.causal_lm))
    model.generate(ids, **GREEDY)
    assert vars(model.causal_lm) == before
    calls, own = [], model.causal_lm.forward
    model.causal_lm.forward = counted = wraps(own)(lambda *args, **inputs: calls.append(1) or own(*args, **inputs))
    counted.__module__ = "transformers.own"
    model.generate(ids, **GREEDY)
    assert model.causal_lm.forward is counted
    assert model.routing.guesses.right
    assert 0 < len(calls) < 12, "a pass that somebody put in its place is what runs, where one runs"


def test_generations_at_once_leave_the_models_own_forward(specimens):
    model = model_with(specimens, 3)
    answering = model.routing._answering
    with answering.installed():
        inner = model.causal_lm.forward
        with answering.installed():
            assert model.causal_lm.forward is inner
        assert model.causal_lm.forward is inner
    assert "forward" not in vars(model.causal_lm)


def test_a_copy_of_the_model_generates_like_it(specimens, ids):
    model = model_with(specimens, 3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert twin.routing.guesses.made == model.routing.guesses.made
