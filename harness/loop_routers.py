"""The routers of the naive loop: each definition of harness/routers.py as a plain module, and the same through the NumPy oracle.

B rows, S tokens, E experts, L routed units, n scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from harness.routers import Classifier, Decider, HybridGate, Router, UnitGate, UnitGates


class LoopRouter(nn.Module, ABC):
    """scores(x), then weights(scores). While `recorded` is a list, every call's scores are appended to it."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Tensor] | None = None

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """(B, S, in) -> (B, S, ..., n)"""

    @abstractmethod
    def weights(self, scores: Tensor) -> Tensor:
        """(B, S, ..., n) -> (B, S, E) or (B, S, L, E)"""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, in) -> (B, S, E) or (B, S, L, E)"""
        scores = self.scores(x)
        if self.recorded is not None:
            self.recorded.append(scores.detach())
        return self.weights(scores)


class LoopHybrid(LoopRouter):
    """DynamicHybridRouter: dense softmax(logits / T) in training, softmax over the top-k logits in evaluation."""

    def __init__(self, definition: HybridGate, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = linear(definition.weight, dtype, definition.bias)
        self.top_k, self.temperature = definition.top_k, definition.temperature

    def scores(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.temperature, dim=-1) if self.training else _softmax_of_top(scores, self.top_k)


class LoopClassifier(LoopRouter):
    """X-LoRA's: Linears with ReLU and dropout between them, then softmax, top-k and softmax again where asked for."""

    def __init__(self, definition: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(weight, dtype, bias) for weight, bias in definition.layers)
        self.dropout = nn.Dropout(definition.dropout)
        self.relu, self.scaling = definition.relu, definition.scaling

    def scores(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index:
                x = self.dropout(torch.relu(x) if self.relu else x)
            x = layer(x)
        return x

    def weights(self, scores: Tensor) -> Tensor:
        how = self.scaling
        found = scores.unflatten(-1, (how.num_layers if how.layerwise else 1, how.num_experts))
        if how.softmax:
            found = torch.softmax(found / how.temperature, dim=-1)
        if how.top_k is not None:
            found = found * torch.zeros_like(found).scatter(-1, found.topk(how.top_k, dim=-1).indices, 1.0)
        if how.softmax_topk and how.over_batch:
            found = self.over_batch(found)
        elif how.softmax_topk:
            found = torch.softmax(found.masked_fill(found == 0, float("-inf")), dim=-1)
        found = how.global_weight * found
        return found if found.shape[2] > 1 or how.layerwise else found[:, :, 0]

    def over_batch(self, found: Tensor) -> Tensor:
        """(B, S, 1 or L, E) -> (B, S, 1 or L, E): in each layer one softmax over what is not 0."""
        how, layers = self.scaling, []
        shared = not (how.layerwise or how.softmax or how.top_k is not None)
        for layer in range(how.num_layers if shared else found.shape[2]):
            given = layers[-1] if shared and layers else found[:, :, layer]
            shares = torch.zeros_like(given)
            shares[given != 0] = torch.softmax(given[given != 0], dim=-1)
            layers.append(shares)
        return torch.stack(layers, dim=2)


class LoopUnitGate(LoopRouter):
    """A gate on one unit's own input; the same in training and in evaluation."""

    def __init__(self, definition: UnitGate, dtype: torch.dtype) -> None:
        super().__init__()
        stored = definition.weight if definition.published is None or dtype == torch.float64 else definition.published
        self.gate = linear(stored, dtype, definition.bias)
        second = definition.threshold
        self.threshold_gate = None if second is None else linear(second[0], dtype, second[1])
        self.rule, self.num_experts = definition.rule, definition.num_experts

    def scores(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        return logits if self.threshold_gate is None else torch.cat([logits, self.threshold_gate(x)], dim=-1)

    def weights(self, scores: Tensor) -> Tensor:
        logits = scores if self.threshold_gate is None else scores[..., :-1]
        found = self.chosen(logits, scores[..., -1:])
        return nn.functional.pad(found, (0, self.num_experts - found.shape[-1]))

    def chosen(self, logits: Tensor, threshold_logit: Tensor) -> Tensor:
        """Weights of the experts here; the rules are those of harness/oracles/gates.py."""
        rule, top_k = self.rule, self.rule.top_k
        if rule.name == "topk_softmax":
            return _softmax_of_top(logits, top_k)
        if rule.name == "arrow":
            return _softmax_of_top(logits.abs(), top_k, rule.temperature)
        dense = torch.softmax(logits, dim=-1)
        if rule.name == "softmax_topk":
            values, experts = dense.topk(top_k, dim=-1)
            return torch.zeros_like(dense).scatter(-1, experts, values / values.sum(dim=-1, keepdim=True))
        if rule.name == "switch":
            return dense * nn.functional.one_hot(dense.argmax(dim=-1), dense.shape[-1])
        if rule.name == "top_p":
            ordered, experts = (dense / rule.temperature).sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            return torch.zeros_like(dense).scatter(-1, experts, ordered * (before <= rule.threshold))
        if rule.name == "threshold":
            dense = dense * (dense >= rule.threshold)
        if rule.name == "adaptive_threshold":
            dense = torch.relu(dense - rule.threshold * torch.sigmoid(threshold_logit))
        total = dense.sum(dim=-1, keepdim=True)
        return dense if rule.name == "softmax" else dense / total.masked_fill(total == 0, 1.0)


class OracleRouter(LoopRouter):
    """A decider as the NumPy oracle computes it, always in evaluation mode."""

    def __init__(self, definition: Decider) -> None:
        super().__init__()
        self.definition = definition
        self.rule = getattr(definition, "rule", None)

    def scores(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.definition.scores(x.detach().numpy()))

    def weights(self, scores: Tensor) -> Tensor:
        return torch.from_numpy(self.definition.weights(scores.numpy()))


def make_router(router: Router | None, dtype: torch.dtype) -> nn.Module | None:
    """The plain module of a router; a ModuleList with one module per unit where each unit has its own gate."""
    if router is None:
        return None
    if isinstance(router, UnitGates):
        return nn.ModuleList(LoopUnitGate(gate, dtype) for gate in router.gates.values())
    return LoopClassifier(router, dtype) if isinstance(router, Classifier) else LoopHybrid(router, dtype)


def oracle_router(router: Router) -> nn.Module:
    """The same through the oracle, in float64."""
    if isinstance(router, UnitGates):
        return nn.ModuleList(OracleRouter(gate) for gate in router.deciders)
    return OracleRouter(router)


def routers_of(router: nn.Module) -> list[nn.Module]:
    """The module for all units, or the one of each unit."""
    return list(router) if isinstance(router, nn.ModuleList) else [router]


def linear(weight: np.ndarray, dtype: torch.dtype, bias: np.ndarray | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return layer


def _softmax_of_top(logits: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    values, experts = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, experts, torch.softmax(values / temperature, dim=-1))
