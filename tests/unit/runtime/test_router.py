from __future__ import annotations

import pytest
import torch

from dylo_moe import DynamicHybridRouter
from dylo_moe.errors import RoutingError
from dylo_moe.router import load_balancing_loss


def test_training_is_dense_softmax_of_logits_over_temperature():
    router = DynamicHybridRouter(5, 3, top_k=1, temperature=2.0)
    h = torch.randn(2, 7, 5)
    torch.testing.assert_close(router(h), torch.softmax(router.gate(h) / 2.0, -1))


def test_evaluation_is_softmax_over_the_top_k_and_ignores_the_temperature():
    router = DynamicHybridRouter(5, 4, top_k=2, temperature=7.0).eval()
    h = torch.randn(2, 7, 5)
    logits, weights = router.gate(h), router(h)
    for b in range(2):
        for s in range(7):
            first, second = logits[b, s].argsort(descending=True)[:2].tolist()
            share = torch.sigmoid(logits[b, s, first] - logits[b, s, second]).item()
            assert weights[b, s, first].item() == pytest.approx(share, rel=1e-5)
            assert weights[b, s, second].item() == pytest.approx(1 - share, rel=1e-4)
            assert (weights[b, s] != 0).sum() == 2


def test_top_1_weight_is_exactly_one():
    weights = DynamicHybridRouter(5, 4).eval()(torch.randn(2, 7, 5))
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_bfloat16_hidden_states_meet_a_float32_gate():
    assert DynamicHybridRouter(5, 4).eval()(torch.randn(1, 2, 5).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 5}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_impossible_values_are_refused(options):
    with pytest.raises(RoutingError, match="but should be"):
        DynamicHybridRouter(5, 4, **options)


def test_mse_loss_is_zero_when_uniform_and_known_when_collapsed():
    assert load_balancing_loss(torch.full((2, 3, 4), 0.25), "mse").item() == 0
    collapsed = torch.zeros(2, 3, 4)
    collapsed[..., 0] = 1
    assert load_balancing_loss(collapsed, "mse").item() == pytest.approx((0.75**2 + 3 * 0.25**2) / 4)
    assert load_balancing_loss(collapsed, "switch").item() == pytest.approx(4.0)
    assert load_balancing_loss(collapsed, "none").item() == 0


def test_padding_does_not_count():
    weights = torch.zeros(1, 4, 2)
    weights[0, :2, 0], weights[0, 2:, 1] = 1, 1
    mask = torch.tensor([[1, 1, 0, 0]])
    assert load_balancing_loss(weights, "mse").item() == 0
    assert load_balancing_loss(weights, "mse", mask).item() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["mse", "switch", "none"])
def test_a_batch_of_padding_alone_has_loss_zero_and_a_gradient_of_zero(kind):
    weights = torch.rand(1, 3, 2, requires_grad=True)
    loss = load_balancing_loss(weights, kind, torch.zeros(1, 3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(weights.grad, torch.zeros(1, 3, 2))


def test_unknown_loss_type_is_refused():
    with pytest.raises(RoutingError, match="load_balance_loss_type"):
        load_balancing_loss(torch.ones(1, 1, 2), "entropy")
