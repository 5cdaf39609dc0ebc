"""The definitions of the load-balancing losses, in float64. T tokens (of all routed layers), E experts."""

from __future__ import annotations

import numpy as np


def loss(weights: np.ndarray, kind: str) -> float:
    """weights (..., E) of the real tokens, padding already left out.

    "mse":    mean_e (P_e - 1/E)^2, P_e the mean weight of expert e (DyLoRA-MoE).
    "switch": E * sum_e f_e P_e, f_e the share of tokens whose largest weight is expert e's (arXiv 2101.03961, eq. 4-6).
    "none":   0.

    Raises:
        ValueError: another kind.
    """
    tokens = np.asarray(weights, np.float64).reshape(-1, np.shape(weights)[-1])
    experts = tokens.shape[1]
    mean = tokens.mean(axis=0)
    if kind == "mse":
        return float(((mean - 1 / experts) ** 2).mean())
    if kind == "switch":
        share = np.bincount(tokens.argmax(axis=1), minlength=experts) / len(tokens)
        return float(experts * (share * mean).sum())
    if kind == "none":
        return 0.0
    raise ValueError(f"load_balance_loss_type {kind!r}, but should be one of mse, switch, none")


def sensitivity(weights: np.ndarray, kind: str) -> float:
    """What the dot-product bound of `loss` multiplies: rounding every P_e by u P_e moves the loss by u times this."""
    tokens = np.asarray(weights, np.float64).reshape(-1, np.shape(weights)[-1])
    experts = tokens.shape[1]
    mean = tokens.mean(axis=0)
    if kind == "mse":
        return float((2 * np.abs(mean - 1 / experts) * (mean + 1 / experts)).mean()) + loss(weights, kind)
    return loss(weights, kind)
