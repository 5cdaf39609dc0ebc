"""The definition of a routed Linear and of its gradients, expert by expert, in float64.

y = W x + b + sum_e w_e s_e B_e A_e x

T tokens, I inputs, O outputs, E experts, r_e rank of expert e:
x (T, I), weight (O, I), bias (O,) or None, lora_A[e] (r_e, I), lora_B[e] (O, r_e), scalings[e] float, routing (T, E).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layer:
    """One routed Linear as arrays: see the module's legend for the shapes."""

    weight: np.ndarray
    bias: np.ndarray | None
    lora_A: tuple[np.ndarray, ...]
    lora_B: tuple[np.ndarray, ...]
    scalings: tuple[float, ...]

    @property
    def num_experts(self) -> int:
        return len(self.lora_A)

    @property
    def longest_sum(self) -> int:
        """Most roundings that one product w s B A x meets on its way into y, in whatever order the sums are taken:
        the sum over inputs, the sum over all ranks, one addition per expert, the base and its bias, four products."""
        return self.weight.shape[1] + sum(a.shape[0] for a in self.lora_A) + self.num_experts + 6


@dataclass(frozen=True)
class Gradients:
    """d loss / d (x, routing, lora_A[e], lora_B[e]); shapes as in the module's legend."""

    x: np.ndarray
    routing: np.ndarray
    lora_A: tuple[np.ndarray, ...]
    lora_B: tuple[np.ndarray, ...]


def base_output(layer: Layer, x: np.ndarray) -> np.ndarray:
    y = np.asarray(x, np.float64) @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def delta(layer: Layer, expert: int, x: np.ndarray) -> np.ndarray:
    """s_e B_e A_e x, (T, O)."""
    return layer.scalings[expert] * (np.asarray(x, np.float64) @ layer.lora_A[expert].T @ layer.lora_B[expert].T)


def mix(layer: Layer, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    y = base_output(layer, x)
    for expert in range(layer.num_experts):
        y = y + np.asarray(routing, np.float64)[:, expert, None] * delta(layer, expert, x)
    return y


def mix_of_absolutes(layer: Layer, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """The same sum over absolute values: the sum|a_i b_i| of the dot-product bound (Higham 2002, section 3.1)."""
    bias = None if layer.bias is None else np.abs(layer.bias)
    absolute = Layer(
        np.abs(layer.weight), bias, tuple(map(np.abs, layer.lora_A)), tuple(map(np.abs, layer.lora_B)),
        tuple(abs(s) for s in layer.scalings),
    )  # fmt: skip
    return mix(absolute, np.abs(x), np.abs(routing))


def merged_weight(layer: Layer, routing: np.ndarray) -> np.ndarray:
    """W + sum_e w_e s_e B_e A_e for one constant routing (E,): (O, I)."""
    weight = layer.weight.copy()
    for expert in range(layer.num_experts):
        weight += routing[expert] * layer.scalings[expert] * (layer.lora_B[expert] @ layer.lora_A[expert])
    return weight


def gradients(layer: Layer, x: np.ndarray, routing: np.ndarray, grad_y: np.ndarray) -> Gradients:
    """Gradients of sum(grad_y * y) by hand; grad_y (T, O)."""
    grad_x = grad_y @ layer.weight
    grad_routing = np.zeros_like(routing, dtype=np.float64)
    grads_A, grads_B = [], []
    for expert, (lora_A, lora_B, scaling) in enumerate(zip(layer.lora_A, layer.lora_B, layer.scalings, strict=True)):
        weighted = scaling * routing[:, expert, None] * grad_y
        grad_x = grad_x + weighted @ lora_B @ lora_A
        grad_routing[:, expert] = (grad_y * delta(layer, expert, x)).sum(axis=1)
        grads_A.append((weighted @ lora_B).T @ x)
        grads_B.append(weighted.T @ (x @ lora_A.T))
    return Gradients(grad_x, grad_routing, tuple(grads_A), tuple(grads_B))
