"""What a mixture of experts is like, in numbers. All of it on NumPy arrays in float64.

Shapes: E experts; `...` any leading axes (tokens, layers, tasks).
"""

from __future__ import annotations

import numpy as np

# Shares that differ by less are equal: float32 weights carry 7 digits.
EQUAL = 1e-6


def shares_of(weights: np.ndarray) -> np.ndarray:
    """|w_e| / sum |w|, (..., E); all 0 where every weight is 0, as below a gate's threshold.

    Absolute, because an X-LoRA without a softmax may weigh below 0, and such an expert speaks too.
    """
    sizes = np.abs(weights)
    total = sizes.sum(axis=-1, keepdims=True)
    return np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)


def entropy_of(shares: np.ndarray) -> np.ndarray:
    """-sum p log p in nats, (...); 0 for one expert alone, log E for all alike (Shannon 1948)."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.maximum(-(shares * logs).sum(axis=-1), 0.0)


def firsts_of(shares: np.ndarray) -> np.ndarray:
    """1 for the expert with the largest share and 0 for the others, (..., E); equals divide the 1; all 0 where all shares are."""
    tops = (shares == shares.max(axis=-1, keepdims=True)) & (shares > 0)
    count = tops.sum(axis=-1, keepdims=True)
    return np.divide(tops, count, out=np.zeros(shares.shape), where=count > 0)


def effective_experts(share: np.ndarray) -> float:
    """exp(entropy): how many equally used experts would be as diverse (Hill number of order 1). share: (E,)."""
    return float(np.exp(entropy_of(share)))


def variation(share: np.ndarray) -> float:
    """Standard deviation of the experts' shares divided by their mean; 0 for a perfect balance, sqrt(E - 1) for one expert."""
    return float(share.std() / share.mean()) if share.any() else 0.0


def dominant(share: np.ndarray) -> int | None:
    """The expert with a larger share than any other; None where two have it, or nobody has any. share: (E,)."""
    top = np.flatnonzero(share >= share.max() - EQUAL)
    return int(top[0]) if len(top) == 1 else None


def balance_losses(mean_weight: np.ndarray, first: np.ndarray) -> dict[str, float]:
    """The losses that training adds to spread the load, as `router.load_balancing_loss` defines them, of all tokens together.

    Args:
        mean_weight: (E,) of the weights as they are.
        first: (E,) share of tokens whose largest weight is the expert's.
    """
    experts = len(mean_weight)
    return {
        "mse": float(((mean_weight - 1 / experts) ** 2).mean()),
        "switch": float(experts * (first * mean_weight).sum()),
    }


def information(task_shares: np.ndarray, tokens: np.ndarray) -> float:
    """Bits that the task tells about the expert: H(mean of all) - mean of each task's H, weighted by tokens; 0 to log2 E.

    The mutual information of task and expert for a token drawn by chance. task_shares: (T, E); tokens: (T,).
    """
    if not tokens.sum():
        return 0.0
    part = tokens / tokens.sum()
    whole = entropy_of((task_shares * part[:, None]).sum(axis=0))
    return float(max(whole - (part * entropy_of(task_shares)).sum(), 0.0) / np.log(2))
