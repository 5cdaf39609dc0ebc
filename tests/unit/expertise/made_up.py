"""A table of passes and what was observed, made up, so that documents and reports are tested without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dylo_moe.expertise.observing import Observed
from dylo_moe.expertise.passes import Passes


def passes(rates: dict[str, Sequence[int]], samples: int = 1) -> Passes:
    """strategy -> samples that pass of each task; the experts are the strategies that begin with "single"."""
    tasks = [f"HumanEval/{number}" for number in range(len(next(iter(rates.values()))))]
    counts = {name: np.full(len(tasks), samples) for name in rates}
    experts = sum(name.startswith("single:") for name in rates)
    return Passes(tasks, {name: np.array(row) for name, row in rates.items()}, counts, experts)


def observed(
    experts: int, chosen: Sequence[int | None], best: Sequence[int] | None = None, *, prompt: Sequence[int] | None = None
) -> dict[str, Observed]:
    """A router that weighs the chosen expert 0.7 and the others alike; None: all alike. prompt: who is chosen there."""
    return {
        f"HumanEval/{number}": Observed(
            prompt=shares(experts, expert if prompt is None else prompt[number]),
            answer=shares(experts, expert),
            best=(best or chosen)[number] or 0,
            divergence=1.0 - np.eye(experts),
            same_choice=np.eye(experts),
            positions=10 + number,
        )
        for number, expert in enumerate(chosen)
    }


def unrouted(experts: int, tasks: int) -> dict[str, Observed]:
    """Of a model without a router."""
    one = Observed(None, None, 0, np.zeros((experts, experts)), np.ones((experts, experts)), 5)
    return {f"HumanEval/{number}": one for number in range(tasks)}


def shares(experts: int, chosen: int | None) -> np.ndarray:
    if chosen is None:
        return np.full(experts, 1 / experts)
    rest = 0.3 / max(1, experts - 1)
    return np.array([0.7 if expert == chosen else rest for expert in range(experts)])
