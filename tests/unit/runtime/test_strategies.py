"""Every strategy against its definition, computed without cache and without batching."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from dylo_moe import MoELoraConfig, attach_router, load_checkpoint
from dylo_moe.errors import RoutingError, UnknownStrategy
from dylo_moe.sampling import Draw, warpers_from_options
from dylo_moe.strategies import Strategy, best_experts, parse_strategy, prompt_losses
from tests.unit.runtime.stock import E, gate_of, stock_peft

NEW = 6


@pytest.fixture(scope="module")
def model(specimens):
    return load_checkpoint(specimens("llama", "base"))


def greedy(model, ids, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


@torch.no_grad()
def recompute(model, ids, **route):
    """Greedy continuation of one row, the whole sequence anew for every token."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False, **route).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1].item() == model.config.eos_token_id:
            break
    return ids


def assert_rows_equal(got, rows):
    for row, wanted in zip(got, rows, strict=True):
        assert torch.equal(row[: wanted.shape[1]], wanted[0])


@pytest.mark.parametrize("features", ["base", "all_experts", "embedding", "layer"])
def test_router_equals_recomputation_row_by_row(specimens, ids, features):
    model = load_checkpoint(specimens("llama", features, targets="attention"))
    assert_rows_equal(greedy(model, ids), [recompute(model, row[None]) for row in ids])


def test_single_equals_stock_peft_token_for_token(specimens, ids):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    wanted = []
    for e in range(E):
        peft_model.set_adapter(f"expert_{e}")
        wanted.append(greedy(peft_model, ids))
    model = attach_router(peft_model, gate_of(path))
    for e in range(E):
        assert torch.equal(greedy(model, ids, strategy=f"single:{e}"), wanted[e])
        assert torch.equal(greedy(model, ids, expert_id=e), wanted[e])


def test_base_equals_the_base_model_token_for_token_and_leaves_no_weights(specimens, model, ids):
    stock = AutoModelForCausalLM.from_pretrained(specimens("llama").parent / "llama", dtype=torch.float32)
    assert torch.equal(greedy(model, ids, strategy="base"), greedy(stock, ids))
    assert not model.last_routing_weights.any()
    assert not torch.equal(greedy(model, ids), greedy(stock, ids))


def test_best_is_the_lowest_loss_of_separate_passes(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    separate = torch.stack([separate_losses(model, ids, mask, e) for e in range(E)], dim=1)
    torch.testing.assert_close(prompt_losses(model, ids, mask), separate, rtol=1e-5, atol=1e-5)
    chosen = best_experts(model, ids, mask)
    assert torch.equal(chosen, separate.argmin(-1))
    plain = best_experts(model, ids)
    rows = [recompute(model, row[None], expert_id=int(e)) for row, e in zip(ids, plain, strict=True)]
    assert_rows_equal(greedy(model, ids, strategy="best"), rows)


@torch.no_grad()
def separate_losses(model, ids, mask, expert):
    losses = []
    for row, keep in zip(ids, mask, strict=True):
        row = row[keep.bool()][None]
        losses.append(torch.nn.functional.cross_entropy(model(row, expert_id=expert).logits[0, :-1], row[0, 1:]))
    return torch.stack(losses)


def test_greedy_ensemble_is_the_argmax_of_the_mean_distribution(model, ids):
    rows = []
    with torch.no_grad():
        for row in ids:
            row = row[None]
            for _ in range(NEW):
                p = torch.stack([model(row, expert_id=e).logits[0, -1].double().softmax(-1) for e in range(E)]).mean(0)
                row = torch.cat([row, p.argmax().view(1, 1)], 1)
                if row[0, -1].item() == model.config.eos_token_id:
                    break
            rows.append(row)
    assert_rows_equal(greedy(model, ids, strategy="ensemble"), rows)


def test_round_robin_row_uses_its_sample_index_modulo_experts(model, ids):
    prompt = ids[:1]
    got = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        strategy="round_robin",
        first_sample=3,
        num_return_sequences=6,
        seeds=list(range(6)),
        do_sample=True,
        top_k=1,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    assert_rows_equal(got, [recompute(model, prompt, expert_id=(3 + k) % E) for k in range(6)])


@pytest.mark.parametrize("strategy", ["router", "single:1", "best", "round_robin", "ensemble"])
def test_a_rows_draws_depend_on_its_seed_alone(model, ids, strategy):
    def sample(seeds, first=0):
        rows = model.generate(
            ids[:1],
            attention_mask=torch.ones(1, ids.shape[1], dtype=torch.long),
            strategy=strategy,
            do_sample=True,
            temperature=1.3,
            seeds=seeds,
            first_sample=first,
            num_return_sequences=len(seeds),
            max_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=-1,
        )
        return [row.tolist() for row in rows]

    together = sample([11, 12, 13, 14])
    assert together == [row for k in range(4) for row in sample([11 + k], first=k)]
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("strategy", ["router", "single:0", "best", "ensemble", "round_robin"])
def test_one_expert_makes_all_strategies_agree(specimens, ids, strategy):
    model = load_checkpoint(specimens("llama", num_experts=1))
    assert torch.equal(greedy(model, ids, strategy=strategy), greedy(model, ids, expert_id=0))


@pytest.mark.parametrize("strategy", ["router", "single:1", "best", "ensemble"])
def test_left_padded_batch_equals_each_prompt_alone(model, ids, strategy):
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "strategy": strategy}
    together = model.generate(padded, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], **options)
    assert torch.equal(together[:1, 3:], alone)


@pytest.mark.parametrize("features", ["base", "embedding"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_generate_options_give_the_same_tokens_with_and_without_cache(specimens, ids, features, options):
    model = load_checkpoint(specimens("llama", features))
    ids = ids[:1] if "prompt_lookup_num_tokens" in options else ids
    plain = {k: v for k, v in options.items() if k.startswith("num_")}
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **plain))


def test_beam_search_of_one_expert_equals_stock_peft(specimens, ids):
    path = specimens("llama")
    peft_model = stock_peft(path, path.parent / "llama")
    peft_model.set_adapter("expert_2")
    wanted = greedy(peft_model, ids, num_beams=3)
    assert torch.equal(greedy(attach_router(peft_model, gate_of(path)), ids, num_beams=3, strategy="single:2"), wanted)


def test_fixed_weights_in_generation_are_used_for_every_token(model, ids):
    weights = torch.tensor([0.5, 0.0, 0.25, 0.25])
    rows = [recompute(model, row[None], routing_weights=weights.view(1, 1, E)) for row in ids]
    assert_rows_equal(greedy(model, ids, routing_weights=weights), rows)


def test_last_weights_during_generation_are_the_last_steps(model, ids):
    greedy(model, ids)
    assert model.last_routing_weights.shape == (3, 1, E)


LEGAL = "router, single:0..single:3, best, ensemble, round_robin"


@pytest.mark.parametrize(
    "text", ["", "single", "single:4", "single:-1", "single:x", "single:²", "Router", "mean", "router:1", None, 2]
)
def test_unknown_strategy_is_refused_naming_the_legal_ones(text):
    with pytest.raises(UnknownStrategy, match=LEGAL):
        parse_strategy(text, E)
    with pytest.raises(ValueError):
        parse_strategy(text, E)


def test_strategies_parse():
    assert parse_strategy("single:3", E) == Strategy("single", 3)
    assert parse_strategy("round_robin", E) == Strategy("round_robin")
    with pytest.raises(UnknownStrategy, match="should be one of router$"):
        parse_strategy("best", 0)
    with pytest.raises(UnknownStrategy, match="single:0"):
        parse_strategy("router", 2, has_router=False)


def test_bag_without_router_runs_every_other_strategy(specimens, ids):
    path = specimens("llama")
    model = attach_router(stock_peft(path, path.parent / "llama"), None, MoELoraConfig(num_experts=E)).eval()
    greedy(model, ids, strategy="best")
    with pytest.raises(UnknownStrategy, match="single:0..single:3"):
        greedy(model, ids)
    with pytest.raises(RoutingError, match="no router"):
        model(ids)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"return_dict_in_generate": True}, {"typical_p": 0.5}])
def test_ensemble_refuses_what_it_cannot_do(model, ids, option):
    with pytest.raises(RoutingError, match=next(iter(option))):
        greedy(model, ids, strategy="ensemble", **option)


def test_draw_leaves_one_token_and_follows_the_mixture_in_frequency():
    # 4000 draws of a known 3-token mixture: each frequency within 4 standard errors (a false alarm in 1 of 5000 runs).
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]).log()
    warpers, _ = warpers_from_options(type("C", (), {})(), {})
    groups = 4000
    draw = Draw(2, warpers, list(range(groups)))
    scores = draw(torch.zeros(2 * groups, 1, dtype=torch.long), p.repeat(groups, 1))
    assert torch.equal(scores[0::2], scores[1::2])
    assert (scores == 0).sum(-1).eq(1).all() and torch.isinf(scores).sum(-1).eq(2).all()
    frequency = torch.bincount(scores[::2].argmax(-1), minlength=3) / groups
    wanted = torch.tensor([0.4, 0.2, 0.4])
    assert ((frequency - wanted).abs() <= 4 * (wanted * (1 - wanted) / groups).sqrt()).all()


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"return_dict_in_generate": True}])
def test_ensemble_refuses_the_same_in_a_generation_config(model, ids, option):
    with pytest.raises(RoutingError, match=f"{next(iter(option))} is not available"):
        model.generate(ids, strategy="ensemble", generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0, **option))


def test_round_robin_refuses_beams_that_would_mix_its_experts(model, ids):
    with pytest.raises(RoutingError, match="num_beams"):
        model.generate(ids, strategy="round_robin", num_beams=4, num_return_sequences=2, max_new_tokens=2, do_sample=False)
