"""The routed layer against stock PEFT and against float64 arithmetic written out here."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.errors import RoutingError, UnknownExpert
from dylo_moe.mixture import Mixture
from dylo_moe.routed import RoutedLinear

RANKS = (2, 3, 5)
D_IN, D_OUT = 7, 11


class Host(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.proj = linear

    def forward(self, x):
        return self.proj(x)


def make_layer(linear: nn.Module | None = None, *, dropout: float = 0.0, rslora: bool = False) -> RoutedLinear:
    model = None
    for e, rank in enumerate(RANKS):
        config = LoraConfig(
            r=rank, lora_alpha=3 + e, target_modules=["proj"], lora_dropout=dropout, use_rslora=rslora, init_lora_weights=False
        )
        if model is None:
            model = get_peft_model(Host(linear or nn.Linear(D_IN, D_OUT)), config, adapter_name="e0")
        else:
            model.add_adapter(f"e{e}", config)
    return RoutedLinear(model.base_model.model.proj, Mixture(["e0", "e1", "e2"]), 0)


def by_definition(layer: RoutedLinear, x: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    """y = W x + b + sum_e w_e s_e B_e A_e x, token by token, in float64."""
    f = lambda t: t.detach().double().numpy()  # noqa: E731
    base = layer.base_layer
    weight = f(base.weight).T if isinstance(base, Conv1D) else f(base.weight)
    y = f(x) @ weight.T + f(base.bias)
    for e in range(len(RANKS)):
        name = f"e{e}"
        delta = f(x) @ f(layer.lora_A[name].weight).T @ f(layer.lora_B[name].weight).T
        y += f(w)[..., e : e + 1] * layer.scaling[name] * delta
    return y


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_mix_equals_the_definition_in_float64(kind, rslora):
    linear = nn.Linear(D_IN, D_OUT) if kind == "linear" else Conv1D(D_OUT, D_IN)
    layer = make_layer(linear, rslora=rslora).double()
    x, w = torch.randn(2, 13, D_IN).double(), torch.randn(2, 13, 3).double()
    np.testing.assert_allclose(layer.mix(x, w).detach().numpy(), by_definition(layer, x, w), rtol=1e-13, atol=1e-13)


def test_single_expert_route_is_bitwise_stock_peft():
    layer = make_layer()
    x = torch.randn(2, 5, D_IN)
    for e in range(3):
        layer.source[0].set_adapter(f"e{e}")
        with layer.mixture.using(e):
            assert torch.equal(layer(x), layer.source[0](x))


def test_no_route_means_base_and_route_none_is_bitwise_base():
    layer = make_layer()
    x = torch.randn(2, 5, D_IN)
    with layer.mixture.using(None):
        assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(RoutingError, match="outside of its model's forward"):
        layer(x)


def test_per_layer_weights_pick_the_layers_own_column():
    layer = make_layer()
    layer.index = 1
    x, w = torch.randn(2, 5, D_IN), torch.randn(2, 5, 4, 3)
    with layer.mixture.using(w):
        assert torch.equal(layer(x), layer.mix(x, w[:, :, 1]))


def test_gradients_equal_finite_differences():
    layer = make_layer().double()
    x, w = torch.randn(1, 3, D_IN).double().requires_grad_(), torch.randn(1, 3, 3).double().requires_grad_()
    parameters = [p[n].weight.requires_grad_() for p in (layer.lora_A, layer.lora_B) for n in ("e0", "e1", "e2")]
    assert torch.autograd.gradcheck(lambda x, w, *_: layer.mix(x, w), (x, w, *parameters))


def test_weights_of_a_pass_have_their_graph_after_a_layer_that_ran_without_one():
    layer = make_layer()
    x, w = torch.randn(1, 3, D_IN), torch.rand(1, 3, 3).requires_grad_()
    with layer.mixture.using(w):
        with torch.no_grad():
            layer(x)
        got = torch.autograd.grad(layer(x).sum(), w)[0]
    torch.testing.assert_close(got, torch.autograd.grad(layer.mix(x, w).sum(), w)[0])


def test_changed_parameters_change_the_result_at_once():
    layer = make_layer()
    x, w = torch.randn(2, 5, D_IN), torch.rand(2, 5, 3)
    before = layer.mix(x, w)
    layer.lora_B["e1"].weight.data.mul_(2)  # through .data: no version counter sees it
    doubled = layer.mix(x, w)
    layer.scaling["e1"] *= 0.5
    assert not torch.equal(before, doubled)
    torch.testing.assert_close(layer.mix(x, w), before, rtol=1e-6, atol=1e-6)


def test_dropout_masks_are_drawn_per_expert_and_off_in_evaluation():
    layer = make_layer(dropout=0.5)
    x, w = torch.randn(1, 4, D_IN), torch.ones(1, 4, 3)
    layer.eval()
    assert torch.equal(layer.mix(x, w), layer.mix(x, w))
    layer.train()
    assert not torch.equal(layer.mix(x, w), layer.mix(x, w))


@pytest.mark.parametrize("shape", [(2, 5, 2), (2, 4, 3), (3, 5, 3), (2, 3)])
def test_weights_of_a_wrong_shape_are_refused(shape):
    layer = make_layer()
    with pytest.raises(RoutingError, match="routing weights of shape"):
        layer.mix(torch.randn(2, 5, D_IN), torch.ones(*shape))


def test_merged_layer_refuses_to_route():
    layer = make_layer()
    layer.source[0].merge()
    with layer.mixture.using(0), pytest.raises(RoutingError, match="unmerge"):
        layer(torch.randn(1, 2, D_IN))


def test_expert_without_an_adapter_here_contributes_nothing():
    layer = make_layer()
    layer.mixture.expert_names.append("elsewhere")
    x, w = torch.randn(1, 4, D_IN), torch.randn(1, 4, 4)
    torch.testing.assert_close(layer.mix(x, w), make_alone(layer, x, w[..., :3]))
    with layer.mixture.using(3):
        assert torch.equal(layer(x), layer.base_layer(x))


def make_alone(layer: RoutedLinear, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    other = copy.deepcopy(layer)
    other.mixture.expert_names.pop()
    return other.mix(x, w)


@pytest.mark.parametrize("expert", [-1, 3, True, 1.0, "0"])
def test_unknown_expert_is_refused(expert):
    with pytest.raises(UnknownExpert, match="from 0 to 2"):
        Mixture(["a", "b", "c"]).check_expert(expert)


def test_bfloat16_base_with_float32_experts_keeps_the_base_dtype():
    layer = make_layer()
    layer.base_layer.to(torch.bfloat16)
    x, w = torch.randn(2, 5, D_IN).bfloat16(), torch.rand(2, 5, 3)
    got = layer.mix(x, w)
    assert got.dtype == torch.bfloat16
    # One rounding of the base product, one of the sum: twice bfloat16's unit roundoff on values of this size.
    assert np.abs(got.detach().double().numpy() - by_definition(layer, x, w)).max() <= 2 * 2**-8 * got.abs().max().item()
