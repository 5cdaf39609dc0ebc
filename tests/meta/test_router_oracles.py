"""The definitions of routers against closed forms: they are what every router is judged by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.oracles import feed_forward, gates, mixture, xlora
from harness.oracles.gates import Rule

LOGITS = np.log([[0.4, 0.3, 0.2, 0.1]])  # whose softmax they are


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (Rule("softmax"), [0.4, 0.3, 0.2, 0.1]),
        (Rule("softmax_topk", top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Rule("topk_softmax", top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Rule("switch"), [0.4, 0, 0, 0]),
        (Rule("top_p", threshold=0.6), [0.4, 0.3, 0, 0]),
        (Rule("top_p", threshold=0.1), [0.4, 0, 0, 0]),
        (Rule("top_p", threshold=0.75, temperature=2.0), [0.2, 0.15, 0.1, 0.05]),
        (Rule("threshold", threshold=0.15), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Rule("threshold", threshold=0.5), [0, 0, 0, 0]),
    ],
)
def test_rule_by_hand(rule: Rule, want: list[float]) -> None:
    np.testing.assert_allclose(gates.weights(rule, LOGITS)[0], want, atol=1e-15)


def test_arrow_ranks_by_magnitude_and_divides_by_the_temperature() -> None:
    logits = np.array([[-2 * math.log(3), 0.5, 0.0, 0.25]])
    weights = gates.weights(Rule("arrow", top_k=2, temperature=2.0), logits)[0]
    ratio = math.exp((2 * math.log(3) - 0.5) / 2)
    np.testing.assert_allclose(weights, [ratio / (1 + ratio), 1 / (1 + ratio), 0, 0])


def test_adaptive_threshold_takes_a_share_of_what_is_above() -> None:
    rule = Rule("adaptive_threshold", threshold=0.5)
    weights = gates.weights(rule, LOGITS, np.zeros((1, 1)))[0]  # sigmoid(0) / 2 = 0.25
    np.testing.assert_allclose(weights, [0.75, 0.25, 0, 0])
    np.testing.assert_allclose(gates.margin(rule, LOGITS, np.zeros((1, 1))), [0.2])


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="one of softmax"):
        gates.weights(Rule("sigmoid"), LOGITS)


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (Rule("softmax"), math.inf),
        (Rule("softmax_topk", top_k=2), math.log(0.3 / 0.2)),
        (Rule("topk_softmax", top_k=4), math.inf),
        (Rule("switch"), math.log(0.4 / 0.3)),
        (Rule("arrow", top_k=1), math.log(3 / 4 * 1 / 0.1) - math.log(0.75)),
        (Rule("top_p", threshold=0.45), 0.05),
        (Rule("threshold", threshold=0.22), 0.02),
    ],
)
def test_margin_by_hand(rule: Rule, want: float) -> None:
    """Of Arrow: magnitudes are those of the logs, 2.30 of 0.1 and 1.61 of 0.2."""
    want = math.log(0.2) - math.log(0.1) if rule.name == "arrow" else want
    assert gates.margin(rule, LOGITS)[0] == pytest.approx(want)


@pytest.mark.parametrize("rule", [Rule("softmax"), Rule("softmax_topk", top_k=2), Rule("topk_softmax", top_k=2), Rule("switch"),
                                  Rule("arrow", top_k=2, temperature=0.3), Rule("top_p", temperature=1.25, threshold=0.5),
                                  Rule("threshold", threshold=0.1), Rule("adaptive_threshold", threshold=0.3)])  # fmt: skip
def test_weights_move_no_more_than_the_sensitivity_says_where_there_is_a_margin(rule: Rule) -> None:
    rng, step = np.random.default_rng(0), 1e-6
    logits, threshold = rng.standard_normal((2000, 4)) * 3, rng.standard_normal((2000, 1))
    moved = [values + step * rng.uniform(-1, 1, values.shape) for values in (logits, threshold)]
    change = np.abs(gates.weights(rule, *moved) - gates.weights(rule, logits, threshold)).max(axis=-1)
    decided = gates.margin(rule, logits, threshold) > 100 * step
    allowed = step * gates.sensitivity(rule, logits, threshold)[:, 0]
    assert (change[decided] <= 1.01 * allowed[decided]).all() and decided.mean() > 0.9
    assert (change > 0.1 * allowed).any()


def test_prototype_tends_to_the_first_right_singular_vector() -> None:
    rng = np.random.default_rng(1)
    lora_A, lora_B, start = rng.standard_normal((3, 9)), rng.standard_normal((7, 3)), rng.standard_normal(9)
    first = np.linalg.svd(lora_B @ lora_A)[2][0]
    alignment = [abs(gates.prototype(lora_A, lora_B, start, steps) @ first) for steps in (1, 15, 2000)]
    assert alignment[0] < alignment[1] < 1 + 1e-12 and alignment[2] == pytest.approx(1.0, abs=1e-12)


def a_scaling(**options: object) -> xlora.Scaling:
    return xlora.Scaling(num_experts=4, num_layers=2, **options)


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        (a_scaling(), [0.4, 0.3, 0.2, 0.1]),
        (a_scaling(top_k=2), [0.4, 0.3, 0, 0]),
        (a_scaling(top_k=2, global_weight=3.0), [1.2, 0.9, 0, 0]),
        (a_scaling(softmax=False), LOGITS[0]),
        (a_scaling(top_k=1, softmax_topk=True), [1, 0, 0, 0]),
        (a_scaling(top_k=2, softmax_topk=True), np.array([math.exp(0.4), math.exp(0.3), 0, 0]) / (math.exp(0.4) + math.exp(0.3))),
        (a_scaling(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.01]) / 0.3),
    ],
)
def test_scalings_by_hand(scaling: xlora.Scaling, want: object) -> None:
    np.testing.assert_allclose(xlora.weights(scaling, LOGITS)[0], want, atol=1e-15)


def test_a_softmax_over_the_batch_is_one_over_all_tokens() -> None:
    two = np.concatenate([LOGITS, LOGITS])
    shares = xlora.weights(a_scaling(top_k=1, softmax_topk=True, over_batch=True), two)
    np.testing.assert_allclose(shares, [[0.5, 0, 0, 0], [0.5, 0, 0, 0]])
    again = xlora.weights(a_scaling(softmax=False, softmax_topk=True, over_batch=True), LOGITS)
    want = [0.4, 0.3, 0.2, 0.1], np.exp([0.4, 0.3, 0.2, 0.1]) / np.exp([0.4, 0.3, 0.2, 0.1]).sum()
    np.testing.assert_allclose(again[0], want)


def test_layerwise_scalings_are_rows_of_experts() -> None:
    z = np.concatenate([LOGITS, LOGITS[:, ::-1]], axis=1)
    found = xlora.weights(a_scaling(layerwise=True), z)
    np.testing.assert_allclose(found[0], [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert xlora.margin(a_scaling(layerwise=True, top_k=2), z) == pytest.approx(math.log(1.5))
    assert xlora.margin(a_scaling(), LOGITS) == math.inf


def test_classifier_has_a_relu_between_its_layers_and_none_after_the_last() -> None:
    layers = ((np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[-2.0, 3.0]]), None))
    assert xlora.scores(np.array([[5.0], [-5.0]]), layers).tolist() == [[-10.0], [15.0]]
    assert xlora.scores(np.array([[5.0]]), layers, relu=False).tolist() == [[-25.0]]


def a_network(rng: np.random.Generator, *, strength: float = 1.0) -> feed_forward.FeedForward:
    def layer(outputs: int, inputs: int) -> mixture.Layer:
        pairs = [(rng.standard_normal((2, inputs)), strength * rng.standard_normal((outputs, 2))) for _ in range(3)]
        weight = rng.standard_normal((outputs, inputs))
        return mixture.Layer(weight, None, tuple(a for a, _ in pairs), tuple(b for _, b in pairs), (1.0, 0.5, 2.0))

    return feed_forward.FeedForward(layer(7, 5), layer(7, 5), layer(5, 7), feed_forward.silu)


def test_one_hot_mix_of_networks_is_one_network() -> None:
    rng = np.random.default_rng(2)
    network, x = a_network(rng), rng.standard_normal((4, 5))
    one_hot = np.tile([0.0, 1.0, 0.0], (4, 1))
    np.testing.assert_allclose(feed_forward.mix(network, x, one_hot), feed_forward.alone(network, 1, x), rtol=1e-13)


def test_mix_of_networks_is_linear_in_the_weights_and_no_mix_in_the_linears() -> None:
    rng = np.random.default_rng(3)
    network, x, routing = a_network(rng), rng.standard_normal((4, 5)), np.full((4, 3), 1 / 3)
    mixed = feed_forward.mix(network, x, routing)
    np.testing.assert_allclose(feed_forward.mix(network, x, 2 * routing), 2 * mixed, rtol=1e-13)
    hidden = network.activation(mixture.mix(network.gate, x, routing)) * mixture.mix(network.up, x, routing)
    assert np.abs(mixture.mix(network.down, hidden, routing) - mixed).max() > 0.1


def test_switch_runs_the_first_tokens_of_an_expert_and_hands_the_others_on_by_hand() -> None:
    rng = np.random.default_rng(5)
    network, x = a_network(rng), rng.standard_normal((5, 5))
    chosen, shares = [1, 0, 1, 1, 0], np.array([0.5, 0.9, 0.6, 0.7, 0.8])
    routing = np.eye(network.gate.num_experts)[chosen] * shares[:, None]
    outputs = np.stack([feed_forward.alone(network, expert, x[token][None])[0] for token, expert in enumerate(chosen)])
    runs = {1: [1, 1, 0, 0, 0], 2: [1, 1, 1, 0, 1], 3: [1, 1, 1, 1, 1]}
    for capacity, these in runs.items():
        want = shares[:, None] * np.where(np.array(these)[:, None], outputs, x)
        np.testing.assert_allclose(feed_forward.switch(network, x, routing, "training", capacity), want, rtol=1e-13)
        np.testing.assert_array_equal(feed_forward.switch(network, x, routing, "inference", capacity), x)
