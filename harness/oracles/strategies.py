"""The definitions of the routing strategies that are more than a forward pass, in float64.

E experts, V vocabulary, P prompt tokens.
"""

from __future__ import annotations

import numpy as np

from harness.oracles.router import softmax


def ensemble_distribution(logits: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mixture of the experts' next-token distributions: sum_e p_e softmax(logits_e); uniform p unless given.

    logits (E, V), weights (E,) -> (V,). Probabilities are averaged, not logits: that would be a product of experts.
    """
    logits = np.asarray(logits, np.float64)
    if weights is None:
        weights = np.full(len(logits), 1 / len(logits))
    return weights @ softmax(logits)


def prompt_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of tokens[1:] under logits (P, V); nan for a prompt of one token."""
    if len(tokens) < 2:
        return float("nan")
    probabilities = softmax(np.asarray(logits[:-1], np.float64))
    return float(-np.log(probabilities[np.arange(len(tokens) - 1), tokens[1:]]).mean())


def best_expert(losses: np.ndarray) -> int:
    """The expert with the lowest loss on the prompt; of equal losses the first."""
    return int(np.argmin(losses))


def round_robin_expert(sample: int, num_experts: int) -> int:
    """Sample k, counted from 0 over the whole run, also across a resume, is written by expert k mod E."""
    return sample % num_experts
