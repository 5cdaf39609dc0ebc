"""The measures against their definitions, and the tally against the training loss of the same tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dylo_moe.router import load_balancing_loss
from dylo_moe.routes.measures import dominant, effective_experts, entropy_of, firsts_of, information, shares_of, variation
from dylo_moe.routes.summary import summarise
from dylo_moe.routes.tally import Observation, Tally


def test_entropy_of_one_expert_of_two_alike_and_of_none():
    np.testing.assert_allclose(entropy_of(np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])), [0, math.log(2), 0])


def test_first_is_divided_by_equals_and_given_to_nobody_without_weight():
    found = firsts_of(np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0]])


def test_shares_ignore_sign_and_size():
    np.testing.assert_array_equal(shares_of(np.array([[-3.0, 1.0], [0.0, 0.0]])), [[0.75, 0.25], [0, 0]])


def test_effective_number_and_variation_go_from_one_expert_to_all():
    assert effective_experts(np.array([0.0, 1.0, 0.0, 0.0])) == 1 and effective_experts(np.full(4, 0.25)) == pytest.approx(4)
    assert variation(np.array([0.0, 1.0, 0.0, 0.0])) == pytest.approx(math.sqrt(3)) and variation(np.full(4, 0.25)) == 0


def test_nobody_is_dominant_where_two_share_the_first_place():
    assert dominant(np.array([0.4, 0.4, 0.2])) is None and dominant(np.array([0.0, 0.0])) is None
    assert dominant(np.array([0.3, 0.5, 0.2])) == 1 and dominant(np.array([1.0])) == 0


def test_task_tells_one_bit_where_two_tasks_have_an_expert_each():
    assert information(np.eye(2), np.array([7, 7])) == pytest.approx(1.0)
    assert information(np.full((2, 2), 0.5), np.array([3, 7])) == 0.0
    assert information(np.eye(2), np.array([0, 0])) == 0.0


def test_losses_are_those_of_training_on_all_tokens_together():
    generator = np.random.default_rng(0)
    tally = Tally(tasks=2, here=[4, 4], num_experts=4, longest=90)
    texts = [generator.dirichlet(np.ones(4), (length, 2)) for length in (90, 5, 31)]
    for number, weights in enumerate(texts):
        tally.add(Observation(task=number % 2, weights=weights, prompt_length=3))
    found = summarise(tally, tasks=["a", "b"], experts=list("wxyz"), layers=["0", "1"])
    together = torch.from_numpy(np.concatenate(texts))[None]
    for kind, value in found["balance"]["load_balancing_loss"].items():
        assert value == pytest.approx(load_balancing_loss(together, kind).item(), rel=1e-12)
    every = np.concatenate(texts)
    assert found["largest_variation_over_tokens"] == pytest.approx(every.std(axis=0).max(), rel=1e-9)
    for number, layer in enumerate(found["layers"]):
        np.testing.assert_allclose(layer["share"], every[:, number].mean(axis=0))
    assert found["positions"]["width"] == 2 and len(found["positions"]["share"]) == 45
    np.testing.assert_allclose(found["positions"]["tokens"][:4], [6, 6, 5, 4])
    np.testing.assert_allclose(found["positions"]["share"][0], np.mean([text[:2].mean(axis=(0, 1)) for text in texts], axis=0))


def test_entropy_of_a_layer_with_fewer_experts_is_compared_with_what_it_can_reach():
    tally = Tally(tasks=1, here=[2, 4], num_experts=4, longest=10)
    weights = np.zeros((10, 2, 4))
    weights[:, 0, :2], weights[:, 1] = 0.5, 0.25
    tally.add(Observation(task=0, weights=weights, prompt_length=10))
    found = summarise(tally, tasks=["a"], experts=list("wxyz"), layers=["narrow", "wide"])
    assert [layer["entropy"] for layer in found["layers"]] == pytest.approx([1, 1])
    assert [layer["coefficient_of_variation"] for layer in found["layers"]] == [0, 0]
    texts = [finding["text"] for finding in found["findings"] if finding["about"] == "undecided"]
    assert texts[-1] == "in 2 of 2 layers the weights are as good as uniform: narrow, wide"


def test_collapse_of_one_layer_is_found_although_the_mean_hides_it():
    tally = Tally(tasks=1, here=[2, 2], num_experts=2, longest=200)
    weights = np.random.default_rng(0).dirichlet(np.ones(2), (200, 2))
    weights[:, 1] = [1, 0]
    tally.add(Observation(task=0, weights=weights, prompt_length=200))
    found = summarise(tally, tasks=["a"], experts=["x", "y"], layers=["healthy", "dead"])
    assert [finding["text"] for finding in found["findings"]] == [
        "in 1 of 2 layers one expert takes almost all of the weight: dead"
    ]
