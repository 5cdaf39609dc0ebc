"""The definition of DynamicHybridRouter: hidden states -> routing weights, in float64.

B rows, S tokens, H hidden size, E experts.
"""

from __future__ import annotations

import numpy as np


def router_logits(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """hidden (..., H), weight (E, H), bias (E,) -> (..., E)."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    return logits if bias is None else logits + np.asarray(bias, np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; the maximum is subtracted first, which changes nothing but the range of exp."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def training_weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Dense: softmax(logits / temperature)."""
    return softmax(np.asarray(logits, np.float64) / temperature)


def evaluation_weights(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Sparse: softmax over the `top_k` largest logits, exactly 0 elsewhere; the temperature has no part in it.

    Of equal logits the first expert wins. Where the k-th and the next logit are (nearly) equal the choice is arbitrary:
    `margin` says how far a token is from that.
    """
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, order, softmax(np.take_along_axis(logits, order, axis=-1)), axis=-1)
    return weights


def margin(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Gap between the last logit chosen and the first one not chosen, (...,); infinite when every expert is chosen."""
    descending = -np.sort(-np.asarray(logits, np.float64), axis=-1)
    if top_k >= descending.shape[-1]:
        return np.full(descending.shape[:-1], np.inf)
    return descending[..., top_k - 1] - descending[..., top_k]
