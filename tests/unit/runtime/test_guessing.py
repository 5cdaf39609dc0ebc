"""Feature passes of guessed tokens: the same logits and tokens as two separate passes, by fewer passes, whoever is right."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from dylo_moe import PeftMoEDecoder, load_checkpoint
from dylo_moe.caches import halves
from dylo_moe.guessing import Guesses
from dylo_moe.pair_cost import PairCost
from dylo_moe.paired_cache import can_pair
from dylo_moe.sampling import foreseen_choice
from tests.unit.runtime.price import Always

STEPS = 7
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
# Both ways add the same products in another order; tokens are the same unless two logits are nearer than this.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}


class Never:
    def width(self, rows: int, chance: float, repeats: float, widest: int) -> int:
        return 0


def model_of(specimens, features="base", dtype=torch.float64, experts=1.0, cost=None, **options):
    model = load_checkpoint(specimens(features=features, top_k=2, **options), dtype=dtype).eval()
    for layer in model.routed_layers().values():
        for expand in layer.lora_B.values():
            expand.weight.data *= experts
    model.routing.pair_cost = Always() if cost is None else cost
    return model


@contextmanager
def rows_of_passes(model):
    """Rows of each pass through the first decoder layer."""
    seen = []
    handle = model.causal_lm.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


class Run:
    """A prompt and then steps of given tokens, as a generation makes them."""

    def __init__(self, model, ids, mask=None):
        self.model, self.mask = model, torch.ones_like(ids) if mask is None else mask
        self.cache, self.shift = None, 0
        self.logits = [self.forward(ids)]

    def step(self, tokens):
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits.append(self.forward(tokens))

    @torch.no_grad()
    def forward(self, ids):
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :] + self.shift
        output = self.model.causal_lm(ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache)
        self.cache = output.past_key_values
        return output.logits[:, -1]


def guessed_run(model, ids, tokens, mask=None, change=lambda run: None):
    """tokens: (rows, steps). change: done to the run in the middle."""
    with model.routing.holding(model, {}), rows_of_passes(model) as passes:
        run = Run(model, ids, mask)
        for index, column in enumerate(tokens.T):
            if index == STEPS // 2:
                change(run)
            run.step(column[:, None])
    return torch.stack(run.logits), passes


def plain_run(model, ids, tokens, mask=None, change=lambda run: None):
    cost, model.routing.pair_cost = model.routing.pair_cost, None
    logits, passes = guessed_run(model, ids, tokens, mask, change)
    model.routing.pair_cost = cost
    return logits, passes


def predicted(model, ids, mask=None, steps=STEPS):
    """What the base goes on with, (rows, steps)."""
    lengths = {"max_new_tokens": steps, "min_new_tokens": steps}
    out = model.generate(ids, attention_mask=mask, strategy="base", **{**GREEDY, **lengths})
    return out[:, ids.shape[1] :]


def other_tokens(tokens):
    return (tokens + 1) % 300


def assert_same(found, wanted, dtype=torch.float64):
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= ROUNDING[dtype] * scale


@pytest.mark.parametrize("features", ["base", "all_experts"])
def test_right_guesses_leave_one_pass_a_step(specimens, ids, features):
    model = model_of(specimens, features, experts=0.0)  # so that all_experts predicts what the base does
    tokens = predicted(model, ids)
    found, passes = guessed_run(model, ids, tokens)
    guesses = model.routing.guesses
    wanted, plain = plain_run(model, ids, tokens)
    assert_same(found, wanted)
    assert plain == [3, 3] * (1 + STEPS)
    assert passes == [3, 3] + [3] + [6] * STEPS
    assert (guesses.made, guesses.right) == (STEPS - 1, STEPS - 1)


def test_right_guess_is_kept_when_the_cache_needs_more_room(specimens, ids):
    model = model_of(specimens)
    tokens = predicted(model, ids[:1], steps=40)
    found, passes = guessed_run(model, ids[:1], tokens)
    assert passes == [1, 1] + [1] + [2] * 40
    assert_same(found, plain_run(model, ids[:1], tokens)[0])


@pytest.mark.parametrize("features", ["base", "all_experts"])
def test_wrong_guesses_are_replaced_by_passes_of_the_right_token(specimens, ids, features):
    model = model_of(specimens, features)
    tokens = other_tokens(predicted(model, ids))
    found, passes = guessed_run(model, ids, tokens)
    guesses = model.routing.guesses
    assert_same(found, plain_run(model, ids, tokens)[0])
    assert passes == [3, 3] + [3, 6] * STEPS
    assert (guesses.made, guesses.right) == (STEPS - 1, 0)


def test_one_row_of_several_that_is_guessed_wrongly_is_repaired(specimens, ids):
    model = model_of(specimens)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    tokens = predicted(model, ids, mask)
    tokens[1, 3:] = other_tokens(tokens[1, 3:])
    found, passes = guessed_run(model, ids, tokens, mask)
    assert_same(found, plain_run(model, ids, tokens, mask)[0])
    assert passes[:9] == [3, 3] + [3, 6, 6, 6] + [3, 6] + [3]


def test_rows_that_ended_and_are_filled_up_are_guessed(specimens, ids):
    model = model_of(specimens)
    tokens = predicted(model, ids)
    tokens[2, 2:] = 0
    _, passes = guessed_run(model, ids, tokens)
    assert passes == [3, 3] + [3, 6, 6] + [3, 6] * 3 + [6] * (STEPS - 5)


def cut_and_other_way(run):
    run.cache.crop(-3)
    run.mask = run.mask[:, :-3]


def rows_swapped(run):
    run.cache.reorder_cache(torch.tensor([2, 0, 1]))


def row_left(run):
    rows = torch.tensor([0, 2, 2])
    run.cache.batch_select_indices(rows)


def written_to(run):
    halves(run.cache)[1][0].values.mul_(-1)


def routed_half_written_to(run):
    halves(run.cache)[0][0].keys.mul_(-1)


def other_positions(run):
    run.shift = 5


def other_mask(run):
    run.mask[1, 2] = 0
    run.shift = torch.tensor([[0], [1], [0]])  # the positions stay


CHANGES = [cut_and_other_way, rows_swapped, row_left, written_to, routed_half_written_to, other_positions, other_mask]


@pytest.mark.parametrize("change", CHANGES)
def test_guess_is_not_used_after_the_cache_or_the_step_has_become_another(specimens, ids, change):
    model = model_of(specimens)
    tokens = predicted(model, ids)
    found, _ = guessed_run(model, ids, tokens, change=change)
    untouched, _ = guessed_run(model, ids, tokens)
    assert (found - untouched)[-1].abs().max() > 1e-3 * found.abs().max()
    assert_same(found, plain_run(model, ids, tokens, change=change)[0])


def test_other_cache_in_between_gets_nothing_of_this_one(specimens, ids):
    model = model_of(specimens)
    tokens = predicted(model, ids)
    with model.routing.holding(model, {}):
        one, other = Run(model, ids), Run(model, ids.flip(0))
        for column in tokens.T:
            one.step(column[:, None])
            other.step(column[:, None])
    assert_same(torch.stack(one.logits), plain_run(model, ids, tokens)[0])
    assert_same(torch.stack(other.logits), plain_run(model, ids.flip(0), tokens)[0])


@pytest.mark.parametrize("experts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_generated_tokens_and_cache_are_those_of_two_passes(specimens, ids, experts, rows):
    model = model_of(specimens, experts=experts)
    ids, mask = ids[:rows], torch.ones_like(ids[:rows])
    mask[-1, :2] = rows == 1
    options = {**GREEDY, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    got = model.generate(ids, attention_mask=mask, **options)
    assert model.routing.guesses.made == 10
    model.routing.pair_cost = None
    wanted = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.past_key_values.layers) == len(wanted.past_key_values.layers)
    for here, there in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert_same(here.keys, there.keys)
        assert_same(here.values, there.values)


def test_returned_cache_can_be_cut_and_continued(specimens, ids):
    model = model_of(specimens, experts=0.3)
    mask = torch.ones_like(ids)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    wanted = model.generate(first.sequences[:, :-4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    first.past_key_values.crop(-4)
    again = model.generate(
        first.sequences[:, :-4], past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_with_seeds_are_those_of_two_passes(specimens, ids, dtype):
    model = model_of(specimens, dtype=dtype, experts=0.1)
    options = {**GREEDY, "do_sample": True, "temperature": 0.2, "seeds": [5, 6, 7], "stop_strings": None}
    got = model.generate(ids, **options)
    assert 0 < model.routing.guesses.made
    model.routing.pair_cost = None
    assert torch.equal(got, model.generate(ids, **options))
    assert len(set(map(tuple, got[:, 9:].tolist()))) == 3


WARPERS = [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 9}, {"top_p": 0.8}, {"seeds": [3, 4, 5], "temperature": 0.7}]


@pytest.mark.parametrize("options", WARPERS, ids=str)
def test_draws_are_foreseen_and_their_random_numbers_left_alone(specimens, ids, options):
    model = model_of(specimens, experts=0.0)  # so that what is predicted is what the draw is from
    options = {**GREEDY, "top_k": 0, "do_sample": True, **options}
    runs = []
    for _ in range(2):
        torch.manual_seed(8)
        runs.append((model.generate(ids, **options), torch.get_rng_state()))
        guesses, model.routing.pair_cost = model.routing.guesses, None
        assert guesses.made == guesses.right == 10
    assert all(map(torch.equal, *runs))


def test_features_without_a_distribution_are_no_error_of_their_own(specimens, ids):
    model = model_of(specimens)
    foreseen = foreseen_choice(model.generation_config, {"temperature": 0.5}, samples=True)
    state = torch.get_rng_state()
    assert foreseen(torch.full((2, 7), float("nan"))).shape == (2,)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_with_unknown_warpers_are_those_of_two_passes(specimens, ids):
    model = model_of(specimens, experts=0.1)
    options = {**GREEDY, "do_sample": True, "typical_p": 0.5, "top_k": 0}
    runs = []
    for _ in range(2):
        torch.manual_seed(8)
        runs.append(model.generate(ids, **options))
        model.routing.pair_cost = None
    assert torch.equal(*runs)


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


FALLBACKS = [
    {"num_beams": 2},
    {"logits_processor": LogitsProcessorList([Own()])},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"output_hidden_states": True, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("options", FALLBACKS, ids=lambda options: next(iter(options)))
def test_what_guesses_do_not_fit_runs_in_two_passes(specimens, ids, options):
    model, ids = model_of(specimens, experts=0.3), ids[:1]
    got = model.generate(ids, **GREEDY, **options)
    guesses = model.routing.guesses
    assert guesses is None or guesses.made <= 1
    model.routing.pair_cost = None
    wanted = model.generate(ids, **GREEDY, **options)
    assert torch.equal(getattr(got, "sequences", got), getattr(wanted, "sequences", wanted))


def test_shared_adapter_runs_in_two_passes(specimens, ids):
    model = model_of(specimens)
    model.mixture.shared = model.expert_names[0]
    model.generate(ids, **GREEDY)
    assert model.routing.guesses is None


def test_a_cache_that_leaves_the_device_is_not_paired(specimens, ids):
    cache = model_of(specimens)(ids, use_cache=True).past_key_values
    assert can_pair(cache)
    cache.offloading = True  # on a GPU: DynamicCache(offloading=True)
    assert not can_pair(cache)


def test_training_mode_and_inference_mode_run_in_two_passes(specimens, ids):
    model = model_of(specimens)
    with torch.inference_mode():
        model.generate(ids, **GREEDY)
    assert model.routing.guesses.made == 0
    model.train().generate(ids, **GREEDY)
    assert model.routing.guesses.made == 0


def test_steps_outside_of_a_generation_run_in_two_passes(specimens, ids):
    model = model_of(specimens)
    with rows_of_passes(model) as passes:
        run = Run(model, ids)
        run.step(ids[:, :1])
    assert passes == [3, 3, 3, 3]


def test_guesses_that_do_not_pay_are_not_made(specimens, ids):
    model = model_of(specimens)
    tokens = predicted(model, ids)
    model.routing.pair_cost = Never()
    assert guessed_run(model, ids, tokens)[1] == [3, 3] * (1 + STEPS)


class Once:
    def __init__(self):
        self.calls = 0

    def width(self, rows: int, chance: float, repeats: float, widest: int) -> int:
        self.calls += 1
        return 1 if self.calls == 1 else 0


def test_right_guess_is_used_where_the_next_one_does_not_pay(specimens, ids):
    model = model_of(specimens)
    tokens = predicted(model, ids)
    model.routing.pair_cost = Once()
    found, passes = guessed_run(model, ids, tokens)
    assert passes == [3, 3] + [3, 6] + [3] + [3, 3] * (STEPS - 2)
    assert_same(found, plain_run(model, ids, tokens)[0])


def test_guesses_stop_where_they_keep_being_wrong_and_are_tried_again_now_and_then(specimens, ids):
    model = model_of(specimens)
    model.routing.pair_cost = cost = PairCost(model.causal_lm)
    cost._measured = {(1, 2, torch.float64, torch.get_num_threads()): 1.05}
    steps = 60
    tokens = torch.randperm(300, generator=torch.Generator().manual_seed(2))[None, :steps]  # none comes twice
    found, passes = guessed_run(model, ids[:1], tokens)
    guesses = model.routing.guesses
    assert guesses.right == 0
    assert 5 < guesses.made < 12
    assert len(passes) == 2 * (1 + steps)  # never a third pass
    assert passes.count(2) == guesses.made + (passes[-1] == 2)
    assert_same(found, plain_run(model, ids[:1], tokens)[0])


def test_text_that_repeats_itself_is_guessed_against_the_prediction(specimens, ids):
    model = model_of(specimens)
    tokens = torch.tensor([[11, 7, 5]]).repeat(1, 12)
    found, passes = guessed_run(model, ids[:1], tokens)
    guesses = model.routing.guesses
    assert guesses.made == 35
    assert guesses.right >= 30
    assert_same(found, plain_run(model, ids[:1], tokens)[0])


def test_price_of_wide_batches_is_two_passes_where_products_are_no_cheaper(specimens):
    cost = PairCost(model_of(specimens).causal_lm)
    cost._measured = {(rows, 2 * rows, torch.float64, torch.get_num_threads()): price for rows, price in ((1, 1.0), (64, 2.0))}
    assert cost.width(1, 0.9, 0.0, 1) == 1
    assert cost.width(1, 0.05, 0.0, 1) == 0
    assert cost.width(64, 1.0, 0.0, 1) == 0


def test_decoder_writes_what_it_writes_in_two_passes(specimens, tmp_path):
    path = specimens(features="base", top_k=2)
    texts = []
    for cost in (Always(), None):
        model = load_checkpoint(path, dtype="float64").eval()
        model.routing.pair_cost = cost
        options = {"model": model, "temperature": 0.4, "max_new_tokens": 12, "batch_size": 3, "force_base_prompt": True}
        decoder = PeftMoEDecoder("x", "humaneval", **options)
        texts.append(decoder.codegen("def f(x):\n", num_samples=5))
        assert cost is None or model.routing.guesses.made
    assert texts[0] == texts[1]


def test_decoder_foresees_its_draws(specimens, tmp_path):
    model = model_of(specimens, experts=0.0)
    options = {"model": model, "temperature": 0.9, "max_new_tokens": 12, "batch_size": 3, "force_base_prompt": True}
    PeftMoEDecoder("x", "humaneval", **options).codegen("def f(x):\n", num_samples=3)
    assert model.routing.guesses.made == model.routing.guesses.right > 5


def test_counts_of_the_last_generation_are_kept_and_nothing_else(specimens, ids):
    model = model_of(specimens)
    model.generate(ids, **GREEDY)
    guesses = model.routing.guesses
    assert isinstance(guesses, Guesses)
    assert guesses.made
    kept = ("_paired", "_ahead", "_chain", "_planned", "_answer")
    assert not any(isinstance(value, torch.Tensor) or (value and name in kept) for name, value in vars(guesses).items())
