"""X-LoRA's router on numbers worked out by hand, and its use without a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylo_moe import attach_router
from dylo_moe.errors import RoutingError
from dylo_moe.formats import XLoraState
from dylo_moe.xlora_router import XLoraRouter
from harness.specimens import write_base, write_checkpoint

# The classifier passes its input on: hidden state (1, 3, 2, 0) gives those logits to the four experts.
IDENTITY = XLoraState(layers=((torch.eye(4), None),), num_experts=4, num_layers=2)
HIDDEN = torch.tensor([[[1.0, 3.0, 2.0, 0.0]]])
SHARES = torch.softmax(HIDDEN, dim=-1)


def weights(state: XLoraState, hidden: torch.Tensor = HIDDEN) -> torch.Tensor:
    return XLoraRouter(state).eval()(hidden)


def test_dense_is_a_softmax_with_temperature_times_the_global_weight():
    state = replace(IDENTITY, softmax_temperature=2.0, global_scaling_weight=0.5)
    assert torch.equal(weights(state), torch.softmax(HIDDEN / 2, dim=-1) * 0.5)


def test_top_k_keeps_the_weights_as_they_are():
    assert torch.equal(weights(replace(IDENTITY, top_k=2)), SHARES * torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_softmax_over_the_top_k_is_over_what_is_not_zero():
    state = replace(IDENTITY, enable_softmax=False, enable_softmax_topk=True, top_k=3)
    expected = torch.zeros(1, 1, 4)
    expected[..., :3] = torch.softmax(HIDDEN[..., :3], dim=-1)
    assert torch.equal(weights(state), expected)
    nothing = weights(state, torch.zeros(1, 1, 4))
    assert torch.equal(nothing, torch.zeros(1, 1, 4))


def test_layerwise_outputs_are_grouped_by_layer():
    state = XLoraState(layers=((torch.eye(4), None),), num_experts=2, num_layers=2, layerwise=True, enable_softmax=False)
    assert weights(state).tolist() == [[[[1.0, 3.0], [2.0, 0.0]]]]


def test_relu_lies_between_the_linears_only():
    layers = ((-torch.eye(4), None), (torch.eye(4), torch.full((4,), -1.0)))
    plain = XLoraState(layers=layers, num_experts=4, num_layers=1, enable_softmax=False)
    assert weights(plain).tolist() == [[[-1.0] * 4]]
    assert weights(replace(plain, use_relu=False)).tolist() == [[[-2.0, -4.0, -3.0, -1.0]]]


def test_dropout_acts_in_training_only():
    layers = ((torch.eye(4), None), (torch.eye(4), None))
    state = XLoraState(layers=layers, num_experts=4, num_layers=1, enable_softmax=False, dropout=0.5)
    assert torch.equal(weights(state), HIDDEN)
    router = XLoraRouter(state).train()
    seen = torch.stack([router(HIDDEN) for _ in range(200)])
    assert set(seen[:, 0, 0, 1].tolist()) == {0.0, 6.0}


def test_sixteen_bit_classifiers_compute_in_float32():
    state = replace(IDENTITY, layers=((torch.eye(4, dtype=torch.bfloat16), None),))
    assert weights(state, HIDDEN.bfloat16()).dtype == torch.float32


def test_state_gives_the_settings_and_tensors_back():
    state = XLoraState(
        layers=((torch.eye(4), torch.ones(4)), (torch.ones(4, 4), torch.zeros(4))),
        num_experts=2,
        num_layers=2,
        layerwise=True,
        enable_softmax=False,
        enable_softmax_topk=True,
        softmax_temperature=3.0,
        top_k=1,
        global_scaling_weight=0.7,
        dropout=0.1,
        use_relu=False,
    )
    again = XLoraRouter(state).state()
    assert replace(again, layers=()) == replace(state, layers=())
    for one, two in zip(again.layers, state.layers, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"softmax_temperature": 0.0}, "softmax_temperature=0.0"),
        ({"num_experts": 3}, "4 outputs for 3 weights"),
    ],
)
def test_an_impossible_state_is_refused(changes, message):
    with pytest.raises(RoutingError, match=message):
        XLoraRouter(replace(IDENTITY, **changes))


def test_attached_by_hand_it_is_named_in_the_configuration(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    experts = write_checkpoint(tmp_path / "experts", base, num_experts=2)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), experts / "experts" / "expert_0", "expert_0")
    stock.load_adapter(experts / "experts" / "expert_1", "expert_1")
    layers = ((torch.randn(2, 48), torch.zeros(2)),)
    model = attach_router(stock, XLoraRouter(XLoraState(layers=layers, num_experts=2, num_layers=8))).eval()
    assert (model.moe_config.router_type, model.moe_config.router_features) == ("xlora", "base")
    with torch.no_grad():
        model(torch.arange(5, 15)[None])
    assert model.last_routing_weights.shape == (1, 10, 2)
