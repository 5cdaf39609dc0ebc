"""The definition of mixing whole feed-forward networks (MixLoRA, arXiv 2404.15159, eq. 6-8), in float64.

y = sum_e w_e FFN_e(x), FFN_e(x) = down_e(act(gate_e(x)) * up_e(x)), each Linear with expert e's adapter alone.
Not a sum of deltas per Linear: what lies between the Linears is not linear, so mixing in them gives another y.

MoE-PEFT's mixlora-switch (SwitchSparseMoe at its commit 40f8cb7): each token has a weight p on one expert e. In training
y = p FFN_e(x) for the first `capacity` tokens of a text that chose e, and p x for those after them; in inference y = x.

T tokens, H hidden size, E experts; x (T, H), routing (T, E) -> (T, H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.oracles import mixture


@dataclass(frozen=True)
class FeedForward:
    """A gated MLP whose three Linears hold the same experts."""

    gate: mixture.Layer
    up: mixture.Layer
    down: mixture.Layer
    activation: Callable[[np.ndarray], np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def alone(network: FeedForward, expert: int, x: np.ndarray) -> np.ndarray:
    """FFN_e(x)."""
    hidden = network.activation(_with(network.gate, expert, x)) * _with(network.up, expert, x)
    return _with(network.down, expert, hidden)


def mix(network: FeedForward, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    outputs = [alone(network, expert, x) for expert in range(network.gate.num_experts)]
    return sum(np.asarray(routing, np.float64)[:, expert, None] * output for expert, output in enumerate(outputs))


def switch(network: FeedForward, x: np.ndarray, routing: np.ndarray, reading: str, capacity: int) -> np.ndarray:
    """One text, T in its order. reading: "training" or "inference"; routing: not 0 for one expert of each token."""
    if reading == "inference":
        return x.copy()
    result, used = np.zeros_like(x), [0] * network.gate.num_experts
    for token, expert in enumerate(np.argmax(np.asarray(routing), axis=-1)):
        used[expert] += 1
        one = x[token][None]
        result[token] = routing[token, expert] * (alone(network, expert, one) if used[expert] <= capacity else one)[0]
    return result


def _with(layer: mixture.Layer, expert: int, x: np.ndarray) -> np.ndarray:
    return mixture.base_output(layer, x) + mixture.delta(layer, expert, x)
