"""The oracles against closed forms, finite differences and counting: they are what everything else is judged by."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from harness.oracles import balance, mixture, pass_at_k, router, strategies

TOKENS, INPUTS, OUTPUTS = 3, 7, 5
RANKS = (2, 3)


def a_layer(rng: np.random.Generator) -> mixture.Layer:
    return mixture.Layer(
        rng.standard_normal((OUTPUTS, INPUTS)),
        rng.standard_normal(OUTPUTS),
        tuple(rng.standard_normal((rank, INPUTS)) for rank in RANKS),
        tuple(rng.standard_normal((OUTPUTS, rank)) for rank in RANKS),
        (2.0, 0.5),
    )


def test_mix_by_hand() -> None:
    layer = mixture.Layer(np.eye(2), np.array([1.0, 2.0]), (np.array([[1.0, 0.0]]),), (np.array([[0.0], [3.0]]),), (2.0,))
    # W x + b = (11, 22); delta = 2 * (0, 3) * 10 = (0, 60); half of it is wanted.
    assert mixture.mix(layer, np.array([[10.0, 20.0]]), np.array([[0.5]])).tolist() == [[11.0, 52.0]]


def test_merged_weight_equals_mix_for_constant_weights() -> None:
    rng = np.random.default_rng(0)
    layer, x, routing = a_layer(rng), rng.standard_normal((TOKENS, INPUTS)), np.array([0.3, -1.2])
    weight, bias = mixture.merged(layer, routing)
    merged = x @ weight.T + bias
    np.testing.assert_allclose(mixture.mix(layer, x, np.tile(routing, (TOKENS, 1))), merged, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("which", ["x", "routing", "lora_A", "lora_B"])
def test_gradients_equal_central_differences(which: str) -> None:
    rng = np.random.default_rng(1)
    layer, x = a_layer(rng), rng.standard_normal((TOKENS, INPUTS))
    routing, grad_y = rng.standard_normal((TOKENS, len(RANKS))), rng.standard_normal((TOKENS, OUTPUTS))
    found = getattr(mixture.gradients(layer, x, routing, grad_y), which)
    targets = {"x": [x], "routing": [routing], "lora_A": layer.lora_A, "lora_B": layer.lora_B}[which]
    found = [found] if which in ("x", "routing") else found
    for target, gradient in zip(targets, found, strict=True):
        for index in np.ndindex(target.shape):
            # The loss is quadratic in no single entry, so the central difference is exact up to rounding.
            slope = _slope(target, index, lambda: float((grad_y * mixture.mix(layer, x, routing)).sum()))
            assert gradient[index] == pytest.approx(slope, rel=1e-7, abs=1e-7)


def _slope(target: np.ndarray, index: tuple[int, ...], loss) -> float:
    value, step = target[index], 1e-3
    target[index] = value + step
    above = loss()
    target[index] = value - step
    below = loss()
    target[index] = value
    return (above - below) / (2 * step)


def test_mix_of_absolutes_is_at_least_every_partial_sum() -> None:
    rng = np.random.default_rng(2)
    layer, x, routing = a_layer(rng), rng.standard_normal((TOKENS, INPUTS)), rng.standard_normal((TOKENS, len(RANKS)))
    largest = mixture.mix_of_absolutes(layer, x, routing)
    assert (largest >= np.abs(mixture.mix(layer, x, routing))).all()
    assert (largest >= np.abs(mixture.base_output(layer, x))).all()


def test_float32_sum_stays_inside_the_bound_of_the_longest_sum() -> None:
    rng = np.random.default_rng(3)
    layer, x, routing = a_layer(rng), rng.standard_normal((TOKENS, INPUTS)), rng.random((TOKENS, len(RANKS)))
    single = [part.astype(np.float32) for part in (layer.weight, layer.bias, *layer.lora_A, *layer.lora_B, x, routing)]
    weight, bias, a0, a1, b0, b1, x32, r32 = single
    rounded = mixture.Layer(*(p.astype(np.float64) for p in (weight, bias)), (a0.astype(float), a1.astype(float)),
                            (b0.astype(float), b1.astype(float)), layer.scalings)  # fmt: skip
    y = x32 @ weight.T + bias
    for expert, (lora_A, lora_B) in enumerate(((a0, b0), (a1, b1))):
        y = y + r32[:, expert, None] * (np.float32(layer.scalings[expert]) * (x32 @ lora_A.T @ lora_B.T))
    error = np.abs(y - mixture.mix(rounded, x32, r32))
    bound = layer.longest_sum * 2.0**-24 * mixture.mix_of_absolutes(rounded, x32, r32)
    assert (error <= bound).all() and error.max() > 0


def test_evaluation_weights_of_one_expert_are_exactly_one_hot() -> None:
    weights = router.evaluation_weights(np.array([[0.1, 3.0, 2.9]]), top_k=1)
    assert weights.tolist() == [[0.0, 1.0, 0.0]]


def test_evaluation_weights_are_a_softmax_over_the_chosen_alone() -> None:
    weights = router.evaluation_weights(np.array([0.0, math.log(3), -5.0]), top_k=2)
    np.testing.assert_allclose(weights, [0.25, 0.75, 0.0], rtol=1e-15)


def test_evaluation_weights_of_equal_logits_choose_the_first() -> None:
    assert router.evaluation_weights(np.zeros((1, 3)), top_k=1).tolist() == [[1.0, 0.0, 0.0]]


def test_training_weights_divide_by_the_temperature() -> None:
    weights = router.training_weights(np.array([0.0, 2 * math.log(4)]), temperature=2.0)
    np.testing.assert_allclose(weights, [0.2, 0.8], rtol=1e-15)


def test_margin_is_the_gap_at_the_edge_of_the_choice() -> None:
    assert router.margin(np.array([[5.0, 1.0, 3.5]]), top_k=2) == pytest.approx(2.5)
    assert router.margin(np.array([[5.0, 1.0]]), top_k=2) == math.inf


def test_ensemble_averages_probabilities_not_logits() -> None:
    sure, unsure = np.array([0.0, math.log(9)]), np.array([0.0, 0.0])
    np.testing.assert_allclose(strategies.ensemble_distribution(np.stack([sure, unsure])), [0.3, 0.7], rtol=1e-15)


def test_prompt_loss_of_uniform_logits_is_the_log_of_the_vocabulary() -> None:
    assert strategies.prompt_loss(np.zeros((4, 11)), np.array([3, 1, 4, 1])) == pytest.approx(math.log(11))
    assert math.isnan(strategies.prompt_loss(np.zeros((1, 11)), np.array([3])))


def test_best_expert_is_the_first_of_the_lowest() -> None:
    assert strategies.best_expert(np.array([2.0, 1.0, 1.0])) == 1


def test_round_robin_continues_after_a_resume() -> None:
    assert [strategies.round_robin_expert(k, 3) for k in range(2, 6)] == [2, 0, 1, 2]


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (6, 1, 3), (7, 7, 2), (4, 0, 4), (8, 3, 5)])
def test_pass_at_k_equals_counting_all_draws(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k.pass_at_k(n, c, k) == Fraction(sum(any(draw) for draw in draws), len(draws))


def test_pass_at_k_refuses_what_has_no_meaning() -> None:
    for n, c, k in [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)]:
        with pytest.raises(ValueError, match="must be in"):
            pass_at_k.pass_at_k(n, c, k)


def test_mean_pass_at_k_is_over_tasks() -> None:
    assert pass_at_k.mean_pass_at_k([(1, 1), (4, 2)], 1) == Fraction(3, 4)


def test_balance_losses_of_even_and_of_lopsided_use() -> None:
    even, lopsided = np.full((2, 5, 4), 0.25), np.eye(4)[np.zeros((2, 5), int)]
    assert balance.loss(even, "mse") == 0
    assert balance.loss(lopsided, "mse") == pytest.approx((0.75**2 + 3 * 0.25**2) / 4)
    assert balance.loss(lopsided, "switch") == pytest.approx(4.0)
    assert balance.loss(lopsided, "none") == 0
    with pytest.raises(ValueError, match="one of mse, switch, none"):
        balance.loss(even, "sum")
