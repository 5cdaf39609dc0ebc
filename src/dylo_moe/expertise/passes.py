"""Who passes what: the table of tasks and strategies that every other comparison starts from.

Shapes: E experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dylo_moe.errors import TaskSetError

HALF = 0.5


@dataclass(frozen=True)
class Passes:
    """How many samples of each task pass under each strategy.

    Attributes:
        tasks: task ids.
        passed: strategy -> (T,) samples that pass.
        samples: strategy -> (T,) samples.
        num_experts: E; the strategies "single:0" to "single:<E - 1>" are there.
    """

    tasks: list[str]
    passed: Mapping[str, np.ndarray]
    samples: Mapping[str, np.ndarray]
    num_experts: int

    @property
    def strategies(self) -> list[str]:
        return list(self.passed)

    def rates(self, strategy: str) -> np.ndarray:
        """(T,) share of the samples that pass, which estimates pass@1 of each task without bias (arXiv 2107.03374)."""
        return self.passed[strategy] / self.samples[strategy]

    @property
    def experts(self) -> np.ndarray:
        """(E, T) rates of the experts alone."""
        return np.stack([self.rates(f"single:{expert}") for expert in range(self.num_experts)])

    @property
    def known(self) -> np.ndarray:
        """(E, T): whether an expert passes a task: with one sample, whether that passes; with several, at least half of them."""
        return self.experts >= HALF

    def rows(self, tasks: Iterable[str]) -> np.ndarray:
        """Places of tasks in the table."""
        place = {task: index for index, task in enumerate(self.tasks)}
        return np.array([place[task] for task in tasks], dtype=int)


def read_passes(results: Mapping[str, Mapping[str, Any]], num_experts: int) -> Passes:
    """The table of scored strategies. A sample passes by all tests that ran.

    results: strategy -> what `results.summarise` returns.

    Raises:
        TaskSetError: an expert is not there, or strategies were scored on different tasks.
    """
    missing = [name for name in (f"single:{expert}" for expert in range(num_experts)) if name not in results]
    if missing:
        raise TaskSetError(f"no results for {', '.join(missing)}")
    first = next(iter(results))
    tasks = list(results[first]["eval"])
    for strategy, result in results.items():
        odd = sorted(set(result["eval"]) ^ set(tasks))
        if odd:
            raise TaskSetError(f"results of {strategy} and {first} differ in the tasks: {', '.join(odd[:5])}")
    rows = {strategy: [result["eval"][task] for task in tasks] for strategy, result in results.items()}
    return Passes(
        tasks=tasks,
        passed={strategy: np.array([sum(map(_passes, samples)) for samples in found]) for strategy, found in rows.items()},
        samples={strategy: np.array([len(samples) for samples in found]) for strategy, found in rows.items()},
        num_experts=num_experts,
    )


def _passes(row: Mapping[str, Any]) -> bool:
    statuses = [status for status in (row["base_status"], row["plus_status"]) if status is not None]
    return bool(statuses) and all(status == "pass" for status in statuses)


@dataclass(frozen=True)
class Best:
    """Who is best at some tasks. experts: all that share the highest pass@1, none where it is 0. rate: that pass@1."""

    experts: list[int]
    rate: float


def best_of(rates: np.ndarray) -> Best:
    """rates: (E, T) -> the experts whose mean over the tasks is highest."""
    means = rates.mean(axis=1)
    highest = float(means.max())
    # Equal sums of different tasks may differ in the last bit.
    chosen = [expert for expert, mean in enumerate(means) if highest - mean < 1e-12] if highest > 0 else []
    return Best(chosen, highest)


def winners(passes: Passes) -> list[list[int]]:
    """For each task the experts with the highest rate; none where no expert ever passes it."""
    return [best_of(column[:, None]).experts for column in passes.experts.T]


def never_best(passes: Passes) -> list[int]:
    """Experts that are the best, alone or with others, on no task."""
    seen = {expert for chosen in winners(passes) for expert in chosen}
    return [expert for expert in range(passes.num_experts) if expert not in seen]


def loss_without(rates: np.ndarray, experts: Sequence[int]) -> float:
    """How much the best choice of expert for every task loses without some of them. rates: (E, T)."""
    rest = np.delete(rates, experts, axis=0)
    left = rest.max(axis=0) if len(rest) else np.zeros(rates.shape[1])
    return float((rates.max(axis=0) - left).mean())


def dispensable(passes: Passes) -> tuple[list[int], list[int]]:
    """Experts without which every task is still passed as often by another one: each alone, and a set that can go together.

    The set is found by taking away the weakest such expert (the later of equals) until none is left; at least one stays.
    """
    rates = passes.experts
    alone = [expert for expert in range(len(rates)) if len(rates) > 1 and loss_without(rates, [expert]) == 0]
    gone: list[int] = []
    for expert in sorted(alone, key=lambda index: (rates[index].mean(), -index)):
        if len(gone) + 1 < len(rates) and loss_without(rates, [*gone, expert]) == 0:
            gone.append(expert)
    return alone, sorted(gone)
