"""The definition of a routed Linear and of its gradients, expert by expert, in float64.

y = W x + b + sum_e w_e delta_e(x), delta_e(x) = s_e (B_e A_e x + c_e)

or, of an expert with a magnitude m_e (DoRA, arXiv 2402.09353, eq. 5; |.| is the norm of each row):

delta_e(x) = m_e / |W + s_e B_e A_e| * (W x + s_e B_e A_e x) - W x

T tokens, I inputs, O outputs, E experts, r_e rank of expert e:
x (T, I), weight (O, I), bias (O,) or None, lora_A[e] (r_e, I), lora_B[e] (O, r_e), scalings[e] float, routing (T, E).
biases[e], magnitudes[e] (O,) or None; empty where no expert has one.
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
    magnitudes: tuple[np.ndarray | None, ...] = ()
    biases: tuple[np.ndarray | None, ...] = ()

    def magnitude(self, expert: int) -> np.ndarray | None:
        return self.magnitudes[expert] if self.magnitudes else None

    def lora_bias(self, expert: int) -> np.ndarray | None:
        return self.biases[expert] if self.biases else None

    @property
    def has_magnitudes(self) -> bool:
        return any(magnitude is not None for magnitude in self.magnitudes)

    def reordered(self, order: list[int]) -> Layer:
        per_expert = (self.lora_A, self.lora_B, self.scalings, self.magnitudes, self.biases)
        return Layer(self.weight, self.bias, *(tuple(values[e] for e in order if values) for values in per_expert))

    @property
    def num_experts(self) -> int:
        return len(self.lora_A)

    @property
    def longest_sum(self) -> int:
        """Most roundings that one product w s B A x meets on its way into y, in whatever order the sums are taken:
        the sum over inputs, the sum over all ranks, one addition per expert, the base and its bias, four products; with
        magnitudes, the sum over inputs in the norm, its root, the quotient and more additions."""
        plain = self.weight.shape[1] + sum(a.shape[0] for a in self.lora_A) + self.num_experts + 6
        return plain + (self.weight.shape[1] + 6 if self.has_magnitudes else 0) + (2 if self.biases else 0)


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
    """delta_e(x), (T, O)."""
    x = np.asarray(x, np.float64)
    low_rank = layer.scalings[expert] * (x @ layer.lora_A[expert].T @ layer.lora_B[expert].T)
    if layer.lora_bias(expert) is not None:
        low_rank = low_rank + layer.scalings[expert] * layer.lora_bias(expert)
    if layer.magnitude(expert) is None:
        return low_rank
    plain = x @ layer.weight.T
    return magnitude_scale(layer, expert) * (plain + low_rank) - plain


def magnitude_scale(layer: Layer, expert: int) -> np.ndarray:
    """m_e / |W + s_e B_e A_e|, (O,)."""
    changed = layer.weight + layer.scalings[expert] * layer.lora_B[expert] @ layer.lora_A[expert]
    return layer.magnitude(expert) / np.linalg.norm(changed, axis=1)


def mix(layer: Layer, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    y = base_output(layer, x)
    for expert in range(layer.num_experts):
        y = y + np.asarray(routing, np.float64)[:, expert, None] * delta(layer, expert, x)
    return y


def mix_of_absolutes(layer: Layer, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """The same sum over absolute values: the sum|a_i b_i| of the dot-product bound (Higham 2002, section 3.1).

    A norm's relative error grows where W and s B A cancel, by the norm of their absolute values over the norm of their sum.
    """
    absolute = absolutes(layer)
    x, routing = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(routing, np.float64))
    y, plain = base_output(absolute, x), x @ absolute.weight.T
    for expert in range(layer.num_experts):
        part = delta(absolute, expert, x)
        if layer.magnitude(expert) is not None:
            low_rank = absolute.scalings[expert] * (absolute.lora_B[expert] @ absolute.lora_A[expert])
            changed = layer.weight + layer.scalings[expert] * layer.lora_B[expert] @ layer.lora_A[expert]
            grown = np.linalg.norm(absolute.weight + low_rank, axis=1) / np.linalg.norm(changed, axis=1)
            part = (1 + grown) * np.abs(magnitude_scale(layer, expert)) * (plain + part) + plain
        y = y + routing[:, expert, None] * part
    return y


def absolutes(layer: Layer) -> Layer:
    """The layer of absolute values, without magnitudes."""
    biases = tuple(None if bias is None else np.abs(bias) for bias in layer.biases)
    bias = None if layer.bias is None else np.abs(layer.bias)
    return Layer(
        np.abs(layer.weight), bias, tuple(map(np.abs, layer.lora_A)), tuple(map(np.abs, layer.lora_B)),
        tuple(abs(s) for s in layer.scalings), biases=biases,
    )  # fmt: skip


def merged(layer: Layer, routing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight (O, I) and bias (O,) of the one Linear that the layer is for a constant routing (E,)."""
    outputs, inputs = layer.weight.shape
    weight, bias = layer.weight.copy(), np.zeros(outputs) if layer.bias is None else layer.bias.copy()
    for expert in range(layer.num_experts):
        constant = delta(layer, expert, np.zeros((1, inputs)))[0]
        bias += routing[expert] * constant
        weight += routing[expert] * (delta(layer, expert, np.eye(inputs)) - constant).T
    return weight, bias


def gradients(layer: Layer, x: np.ndarray, routing: np.ndarray, grad_y: np.ndarray) -> Gradients:
    """Gradients of sum(grad_y * y) by hand; grad_y (T, O). Not for experts with magnitudes."""
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
