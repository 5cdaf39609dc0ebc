"""How alike experts are by what they do: which tasks they pass, and what they expect next.

Shapes: E experts, T tasks, P positions of a prompt, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def jaccard(known: np.ndarray) -> np.ndarray:
    """(E, E): tasks that both pass / tasks that at least one passes; NaN where neither passes any (Jaccard 1901).

    known: (E, T) whether an expert passes a task.
    """
    sets = known.astype(float)
    both = sets @ sets.T
    either = sets.sum(1)[:, None] + sets.sum(1)[None, :] - both
    return np.divide(both, either, out=np.full_like(both, math.nan), where=either > 0)


def phi(known: np.ndarray) -> np.ndarray:
    """(E, E): Pearson's correlation of passing, -1 to 1; NaN where an expert passes all tasks or none.

    phi = (n n11 - n1. n.1) / sqrt(n1. (n - n1.) n.1 (n - n.1)), Yule 1912, with the counts of the 2 x 2 table.
    """
    sets = known.astype(float)
    tasks, sizes = known.shape[1], sets.sum(1)
    above = tasks * (sets @ sets.T) - np.outer(sizes, sizes)
    spread = np.sqrt(sizes * (tasks - sizes))
    below = np.outer(spread, spread)
    return np.divide(above, below, out=np.full_like(above, math.nan), where=below > 0)


def divergences(logits: Tensor) -> Tensor:
    """logits: (E, P, V) of the same tokens -> (E, E) with the mean over positions of KL(p_i || p_j) in nats.

    KL(p || q) = sum_v p_v (log p_v - log q_v), Kullback and Leibler 1951; not symmetric, never below 0.
    """
    logs = logits.float().log_softmax(-1)
    rows = [(log.exp() * (log - logs)).sum(-1).mean(-1) for log in logs]
    return torch.stack(rows).clamp(min=0.0)


def same_choices(logits: Tensor) -> Tensor:
    """logits: (E, P, V) -> (E, E): the share of positions at which two experts' likeliest next token is the same."""
    likeliest = logits.argmax(-1)
    return (likeliest[:, None] == likeliest[None, :]).float().mean(-1)
