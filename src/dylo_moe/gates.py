"""One gate for one routed unit, on the unit's own input: Arrow, mergoo, LoRAMoE, HydraLoRA, MoLA, AdaMoLE, MixLoRA.

Shapes: B batch, S sequence, E experts of the model, e experts of this unit (e <= E), I inputs of the unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dylo_moe.errors import RoutingError
from dylo_moe.formats import GATE_RULES, MIXLORA_SWITCH, GatesState, GateState
from dylo_moe.router import stored, wide_linear


class LayerGate(nn.Module):
    """Weights of one unit's experts from the unit's input, by one of GATE_RULES; the same in training and evaluation.

    Args:
        state: the gate's tensors and top_k.
        gates: what all gates of the model share: rule, temperature, threshold, number of experts, the MLPs' activation.

    Raises:
        RoutingError: an unknown rule, a rule without its threshold, or top_k out of range.
    """

    def __init__(self, state: GateState, gates: GatesState) -> None:
        super().__init__()
        here, self.input_size = state.weight.shape
        _check(state, gates, here)
        self.num_experts = gates.num_experts
        self.rule = gates.rule
        self.top_k = state.top_k
        self.temperature = gates.temperature
        self.threshold = gates.threshold
        self.activation = gates.activation
        self.mixlora_switch = gates.mixlora_switch
        self.expert_capacity = gates.expert_capacity
        self.gate = wide_linear(state.weight, state.bias)
        self.threshold_gate = None
        if state.threshold_weight is not None:
            self.threshold_gate = wide_linear(state.threshold_weight, state.threshold_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, I) of any float dtype -> weights (B, S, E) in the gate's; experts that are not here have weight 0."""
        x = x.to(self.gate.weight.dtype)
        weights = _RULES[self.rule](self, self.gate(x), x)
        return nn.functional.pad(weights, (0, self.num_experts - weights.shape[-1]))

    @property
    def needs_whole_pass(self) -> bool:
        """Whether a token's place among those of its row counts."""
        return self.mixlora_switch == "training"

    def within_capacity(self, weights: Tensor, tokens: Tensor | None) -> Tensor:
        """Whose expert runs: the first expert_capacity tokens of a row that chose it, (B, S, 1).

        weights: (B, S, E), one of them not 0; tokens: (B, S), 0 where there is padding, which is not counted; None for none.
        """
        chosen = weights != 0
        if tokens is not None:
            chosen = chosen & (tokens != 0).to(chosen.device)[..., None]
        return (chosen & (chosen.cumsum(dim=1) <= self.expert_capacity)).any(dim=-1, keepdim=True)

    def state(self) -> GateState:
        """The tensors as they are now, on the CPU."""
        threshold = self.threshold_gate
        return GateState(
            weight=stored(self.gate.weight),
            bias=stored(self.gate.bias),
            top_k=self.top_k,
            threshold_weight=None if threshold is None else stored(threshold.weight),
            threshold_bias=None if threshold is None else stored(threshold.bias),
        )

    def extra_repr(self) -> str:
        return f"rule={self.rule}, top_k={self.top_k}"


def _softmax(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _softmax_topk(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    top = torch.topk(torch.softmax(logits, dim=-1), gate.top_k, dim=-1)
    return _scattered(logits, top.indices, top.values / top.values.sum(dim=-1, keepdim=True))


def _topk_softmax(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    top = torch.topk(logits, gate.top_k, dim=-1)
    return _scattered(logits, top.indices, torch.softmax(top.values, dim=-1))


def _switch(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    top = torch.softmax(logits, dim=-1).max(dim=-1, keepdim=True)
    return _scattered(logits, top.indices, top.values)


def _arrow(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    top = torch.topk(logits.abs(), gate.top_k, dim=-1)
    return _scattered(logits, top.indices, torch.softmax(top.values / gate.temperature, dim=-1))


def _top_p(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    # MoE-PEFT's "mixlora-dynamic": the temperature divides the probabilities, and the one that exceeds the threshold is kept.
    ordered, order = torch.sort(torch.softmax(logits, dim=-1) / gate.temperature, dim=-1, descending=True)
    beyond = (ordered.cumsum(dim=-1) > gate.threshold).cumsum(dim=-1) > 1
    return _scattered(logits, order, ordered.masked_fill(beyond, 0.0))


def _threshold(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    probabilities = torch.softmax(logits, dim=-1)
    return _normalised(torch.where(probabilities >= gate.threshold, probabilities, 0.0))


def _adaptive_threshold(gate: LayerGate, logits: Tensor, x: Tensor) -> Tensor:
    threshold = gate.threshold * torch.sigmoid(gate.threshold_gate(x))
    return _normalised(torch.relu(torch.softmax(logits, dim=-1) - threshold))


_RULES: dict[str, Callable[[LayerGate, Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "softmax_topk": _softmax_topk,
    "topk_softmax": _topk_softmax,
    "switch": _switch,
    "arrow": _arrow,
    "top_p": _top_p,
    "threshold": _threshold,
    "adaptive_threshold": _adaptive_threshold,
}
_WITH_TOP_K = ("softmax_topk", "topk_softmax", "arrow")
_WITH_THRESHOLD = ("top_p", "threshold", "adaptive_threshold")


def _scattered(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, indices, values)


def _normalised(weights: Tensor) -> Tensor:
    """Divided by their sum; all zero stays all zero."""
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _check(state: GateState, gates: GatesState, here: int) -> None:
    if gates.rule not in GATE_RULES:
        raise RoutingError(f"gate rule {gates.rule!r}, but should be one of {', '.join(GATE_RULES)}")
    if gates.rule in _WITH_TOP_K and (state.top_k is None or not 1 <= state.top_k <= here):
        raise RoutingError(f"top_k={state.top_k} of a gate, but should be from 1 to {here}, its number of experts")
    if gates.rule in _WITH_THRESHOLD and gates.threshold is None:
        raise RoutingError(f"gate rule {gates.rule} without a threshold")
    if gates.rule == "switch" and (gates.mixlora_switch not in MIXLORA_SWITCH or gates.expert_capacity is None):
        raise RoutingError("gate rule switch without mixlora_switch, one of training, inference, or without expert_capacity")
    if gates.rule == "adaptive_threshold" and state.threshold_weight is None:
        raise RoutingError("gate rule adaptive_threshold without a threshold gate")
    if gates.rule in ("arrow", "top_p") and not gates.temperature > 0:
        raise RoutingError(f"temperature={gates.temperature}, but should be above 0")
