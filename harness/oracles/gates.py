"""The definitions of per-layer gates: the input of a routed unit -> weights of its experts, in float64.

x (..., I), weight (E, I), bias (E,) or None; logits = W x + b; weights (..., E).

rule                 weights                                               published in (arXiv)
softmax              p = softmax(logits)                                   LoRAMoE 2312.09979, HydraLoRA 2404.19245
softmax_topk         p on its top_k, divided by their sum                  MixLoRA 2404.15159, MoLA 2402.08562, MoLE
topk_softmax         softmax over the top_k logits                         mergoo
switch               p on the likeliest, not divided                       MixLoRA's "switch" routing in MoE-PEFT
arrow                softmax over the top_k of |logits| / temperature      Arrow 2405.11157
top_p                q = p / temperature on the likeliest experts, until   MixLoRA's "dynamic" routing in MoE-PEFT
                     their sum exceeds threshold
threshold            p where p >= threshold, divided by their sum          MoLE
adaptive_threshold   r / sum(r), r = max(0, p - t),                        AdaMoLE 2405.00361
                     t = threshold * sigmoid(threshold gate)

Elsewhere 0. Of equal scores the first expert wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.oracles.router import router_logits, softmax

RULES = ("softmax", "softmax_topk", "topk_softmax", "switch", "arrow", "top_p", "threshold", "adaptive_threshold")
_BY_RANK = ("softmax_topk", "topk_softmax", "arrow")


@dataclass(frozen=True)
class Rule:
    """How the gate of one unit chooses; what the rule does not need stays at its default.

    mixlora_switch, expert_capacity: of "switch", what its network does with the choice; see harness/oracles/feed_forward.py.
    """

    name: str
    top_k: int | None = None
    temperature: float = 1.0
    threshold: float | None = None
    mixlora_switch: str | None = None
    expert_capacity: int | None = None


def scores(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The gate's logits, (..., E)."""
    return router_logits(x, weight, bias)


def weights(rule: Rule, logits: np.ndarray, threshold_logit: np.ndarray | None = None) -> np.ndarray:
    """logits (..., E), threshold_logit (..., 1) of AdaMoLE's second gate -> (..., E).

    Raises:
        ValueError: a rule that is none of RULES.
    """
    logits = np.asarray(logits, np.float64)
    if rule.name == "softmax":
        return softmax(logits)
    if rule.name == "softmax_topk":
        return _share(np.where(_top(logits, rule.top_k), softmax(logits), 0.0))
    if rule.name == "topk_softmax":
        return softmax(np.where(_top(logits, rule.top_k), logits, -np.inf))
    if rule.name == "arrow":
        return softmax(np.where(_top(np.abs(logits), rule.top_k), np.abs(logits) / rule.temperature, -np.inf))
    probabilities = softmax(logits)
    if rule.name == "switch":
        return np.where(_top(logits, 1), probabilities, 0.0)
    if rule.name == "top_p":
        quotients = probabilities / rule.temperature
        return np.where(_sum_of_likelier(quotients) <= rule.threshold, quotients, 0.0)
    if rule.name == "threshold":
        return _share(np.where(probabilities >= rule.threshold, probabilities, 0.0))
    if rule.name == "adaptive_threshold":
        return _share(_above(rule, probabilities, threshold_logit))
    raise ValueError(f"rule {rule.name!r}, but should be one of {', '.join(RULES)}")


def margin(rule: Rule, logits: np.ndarray, threshold_logit: np.ndarray | None = None) -> np.ndarray:
    """How far a token is from another choice of experts, (...,), in units of logits or of probabilities, which move by half as
    much; infinite where nothing is chosen. For adaptive_threshold the sum that the weights are divided by: near 0 they jump.
    """
    logits = np.asarray(logits, np.float64)
    if rule.name in _BY_RANK:
        return _edge(np.abs(logits) if rule.name == "arrow" else logits, rule.top_k)
    if rule.name == "switch":
        return _edge(logits, 1)
    probabilities = softmax(logits)
    if rule.name == "top_p":
        quotients = probabilities / rule.temperature
        before = _sum_of_likelier(quotients)
        kept = np.where(before <= rule.threshold, quotients, np.inf).min(axis=-1)
        left = np.where(before <= rule.threshold, -np.inf, quotients).max(axis=-1)
        return np.minimum(np.abs(before - rule.threshold).min(axis=-1), kept - left)
    if rule.name == "threshold":
        return np.abs(probabilities - rule.threshold).min(axis=-1)
    if rule.name == "adaptive_threshold":
        return _above(rule, probabilities, threshold_logit).sum(axis=-1)
    return np.full(logits.shape[:-1], np.inf)


def sensitivity(rule: Rule, logits: np.ndarray, threshold_logit: np.ndarray | None = None) -> np.ndarray:
    """How far a weight moves, at most, per unit that the logits (and the threshold's) move, while the choice stays: (..., 1).

    A softmax's Jacobian has rows that sum to at most 1/2 in magnitude, over any set of experts; a temperature divides it.
    r / sum(r) moves by at most sum|dr| / sum(r), and sum|dr| by at most 1 + E threshold / 4: all probabilities together move by
    at most 1, and a sigmoid's steepest slope is 1/4.
    """
    shape = (*np.shape(logits)[:-1], 1)
    if rule.name in ("arrow", "top_p"):
        return np.full(shape, 0.5 / rule.temperature)
    if rule.name == "adaptive_threshold":
        total = _above(rule, softmax(np.asarray(logits, np.float64)), threshold_logit).sum(axis=-1, keepdims=True)
        slope = 1 + np.shape(logits)[-1] * rule.threshold / 4
        return slope / np.where(total > 0, total, np.inf)
    return np.full(shape, 0.5)


def prototype(lora_A: np.ndarray, lora_B: np.ndarray, start: np.ndarray, steps: int = 15) -> np.ndarray:
    """Arrow's prototype of one expert (arXiv 2405.11157): power iteration on A^T B^T B A from `start` (I,), of unit length.

    After PEFT's 15 steps it need not have converged to the first right singular vector of B A, so the start is part of it.
    """
    vector = start / np.linalg.norm(start)
    for _ in range(steps):
        vector = lora_A.T @ (lora_B.T @ (lora_B @ (lora_A @ vector)))
        vector = vector / np.linalg.norm(vector)
    return vector


def _top(values: np.ndarray, top_k: int) -> np.ndarray:
    chosen = np.zeros(values.shape, bool)
    order = np.argsort(-values, axis=-1, kind="stable")[..., :top_k]
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def _edge(values: np.ndarray, top_k: int) -> np.ndarray:
    descending = -np.sort(-values, axis=-1)
    if top_k >= values.shape[-1]:
        return np.full(values.shape[:-1], np.inf)
    return descending[..., top_k - 1] - descending[..., top_k]


def _sum_of_likelier(probabilities: np.ndarray) -> np.ndarray:
    """For each expert the sum of the probabilities before it in descending order."""
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=-1)
    before = np.zeros_like(probabilities)
    np.put_along_axis(before, order, np.cumsum(ordered, axis=-1) - ordered, axis=-1)
    return before


def _above(rule: Rule, probabilities: np.ndarray, threshold_logit: np.ndarray) -> np.ndarray:
    threshold = rule.threshold / (1 + np.exp(-np.asarray(threshold_logit, np.float64)))
    return np.maximum(probabilities - threshold, 0.0)


def _share(values: np.ndarray) -> np.ndarray:
    """Divided by their sum; all zero stays all zero."""
    total = values.sum(axis=-1, keepdims=True)
    return values / np.where(total > 0, total, 1.0)
