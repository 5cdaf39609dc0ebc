"""X-LoRA's router (arXiv 2402.07148): an MLP on the base model's last hidden state speaks for every token.

Shapes: B batch, S sequence, H hidden size, E experts, L routed layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dylo_moe.errors import RoutingError
from dylo_moe.formats import XLoraState
from dylo_moe.router import stored, wide_linear


class XLoraRouter(nn.Module):
    """The classifier of PEFT's XLoraModel, with the same order of operations.

    logits = MLP(h); weights = softmax(logits / temperature) if enable_softmax, else logits; all but the top_k become 0 and the
    rest is not renormalised; with enable_softmax_topk a softmax over those that are not 0; times global_scaling_weight.
    Dropout acts in training only.

    Where state.over_batch, that softmax is one over all that are not 0 of all tokens and rows of the pass, padding too, as in
    github.com/EricLBuehler/xlora and in PEFT before 0.18. Both write it over the scalings, which all layers share where neither
    a softmax nor a top_k made a copy of them: there layer l has it l + 1 times.

    Raises:
        RoutingError: top_k, temperature or the layers' widths contradict the rest of the state.
    """

    is_tokenwise = True  # a token's weights hang on no other token of the pass, but where it says needs_whole_pass

    def __init__(self, state: XLoraState) -> None:
        super().__init__()
        _check(state)
        self.input_size = state.hidden_size
        self.num_experts = state.num_experts
        self.num_layers = state.num_layers
        self.layerwise = state.layerwise
        self.top_k = state.top_k
        self.temperature = state.softmax_temperature
        self.enable_softmax = state.enable_softmax
        self.enable_softmax_topk = state.enable_softmax_topk
        self.softmax_topk = state.softmax_topk
        self.needs_whole_pass = state.over_batch
        self.global_scaling_weight = state.global_scaling_weight
        self.dropout = state.dropout
        self.use_relu = state.use_relu
        self.layers = nn.ModuleList(wide_linear(weight, bias) for weight, bias in state.layers)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) of any float dtype -> weights (B, S, E), or (B, S, L, E) where layers differ, in the classifier's dtype."""
        x = hidden_states.to(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            x = layer(x)
            if self.use_relu:
                x = F.dropout(F.relu(x), self.dropout, self.training)
        weights = self.layers[-1](x)
        if self.layerwise:
            weights = weights.unflatten(-1, (self.num_layers, self.num_experts))
        if self.enable_softmax:
            weights = torch.softmax(weights / self.temperature, dim=-1)
        return self._selected(weights) * self.global_scaling_weight

    def _selected(self, weights: Tensor) -> Tensor:
        if self.top_k is not None:
            kept = torch.topk(weights, self.top_k, dim=-1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, kept, 1.0)
        if self.needs_whole_pass:
            return self._over_batch(weights)
        if self.enable_softmax_topk:
            present = weights != 0
            # Where all weights are 0 the softmax is NaN and is not used.
            shares = torch.softmax(weights.masked_fill(~present, float("-inf")), dim=-1)
            weights = shares.masked_fill(~present, 0.0)
        return weights

    def _over_batch(self, weights: Tensor) -> Tensor:
        if self.layerwise:
            return torch.stack([_softmax_of_present(layer) for layer in weights.unbind(2)], dim=2)
        if self.enable_softmax or self.top_k is not None:
            return _softmax_of_present(weights)
        layers = [_softmax_of_present(weights)]
        for _ in range(self.num_layers - 1):
            layers.append(_softmax_of_present(layers[-1]))
        return torch.stack(layers, dim=2)

    def state(self) -> XLoraState:
        """The settings, and the tensors as they are now, on the CPU."""
        return XLoraState(
            layers=tuple((stored(layer.weight), stored(layer.bias)) for layer in self.layers),
            num_experts=self.num_experts,
            num_layers=self.num_layers,
            layerwise=self.layerwise,
            enable_softmax=self.enable_softmax,
            enable_softmax_topk=self.enable_softmax_topk,
            softmax_topk=self.softmax_topk,
            softmax_temperature=self.temperature,
            top_k=self.top_k,
            global_scaling_weight=self.global_scaling_weight,
            dropout=self.dropout,
            use_relu=self.use_relu,
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}, temperature={self.temperature}, layerwise={self.layerwise}"


def _softmax_of_present(weights: Tensor) -> Tensor:
    """One softmax over all numbers of the tensor that are not 0; the others stay 0."""
    present = weights != 0
    shares = torch.softmax(weights.masked_fill(~present, float("-inf")).flatten(), dim=0).view(weights.shape)
    return shares.masked_fill(~present, 0.0)


def _check(state: XLoraState) -> None:
    if state.top_k is not None and not 1 <= state.top_k <= state.num_experts:
        raise RoutingError(f"top_k={state.top_k}, but should be None or from 1 to num_experts={state.num_experts}")
    if not state.softmax_temperature > 0:
        raise RoutingError(f"softmax_temperature={state.softmax_temperature}, but should be above 0")
    outputs = state.num_experts * (state.num_layers if state.layerwise else 1)
    found = state.layers[-1][0].shape[0]
    if found != outputs:
        raise RoutingError(f"a classifier of {found} outputs for {outputs} weights of {state.num_experts} experts")
