"""Comparisons of next-token distributions equal their definitions."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from dylo_moe.expertise.answers import divergences, same_choices
from dylo_moe.expertise.choices import NOBODY
from dylo_moe.expertise.observing import heaviest


def test_divergence_is_the_mean_of_scipys():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = softmax(logits.double().numpy(), axis=-1)
    wanted = [[rel_entr(p[i], p[j]).sum(-1).mean() for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(divergences(logits), wanted, atol=1e-5)


def test_sure_experts_that_disagree_have_a_large_and_finite_divergence():
    logits = torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]])
    assert divergences(logits).tolist() == [[0.0, 200.0], [200.0, 0.0]]
    assert np.exp(log_softmax([200.0, 0.0])[0]) == 1


def test_same_choice_is_the_share_of_positions():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 0]]), 3).float()
    assert same_choices(logits).tolist() == [[1.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize(
    ("shares", "expert"),
    [([0.2, 0.5, 0.3], 1), ([0.5, 0.5], NOBODY), ([0.4, 0.2, 0.4], NOBODY), ([0.0, 0.0], NOBODY), ([1.0], 0), (None, NOBODY)],
)
def test_heaviest_has_more_weight_than_any_other(shares, expert):
    assert heaviest(None if shares is None else np.array(shares)) == expert
