"""What the router chose against what would have been best.

Shapes: E experts, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dylo_moe.expertise.passes import Passes

NOBODY = -1  # the router gave no expert any weight on this task


@dataclass(frozen=True)
class Regret:
    """Means over tasks; all in 0 to 1 except the differences.

    Attributes:
        oracle: pass@1 of the best expert of every task, the bound of any choice of one expert per task. With several samples per
            task it is the largest of E noisy numbers, so it is too high by chance.
        router: pass@1 of the router's own answers.
        chosen: pass@1 of the experts that the router weighs most, each alone.
        best_single: pass@1 of the one expert that is best over all tasks, chosen with hindsight.
        random: pass@1 of an expert drawn by chance for each task.
        regret: oracle - router; negative where the mixture passes what no expert alone does.
        by_choice: oracle - chosen: what is lost because the router weighs another expert most.
        by_mixing: chosen - router: what is lost because the mixture answers and not that expert.
        per_task: (T,) regret of each task.
    """

    oracle: float
    router: float
    chosen: float
    best_single: float
    random: float
    regret: float
    by_choice: float
    by_mixing: float
    per_task: np.ndarray


def regret(passes: Passes, chosen: np.ndarray) -> Regret:
    """How much a router loses against the best expert of every task (`oracle routing`).

    In the words of online learning, the loss of the choices made against that of the best ones in hindsight, which may change
    from task to task (the virtual best solver of algorithm selection, Rice 1976; arXiv 1806.04010).

    Args:
        passes: with the strategy "router".
        chosen: (T,) the expert that the router weighs most, or NOBODY.
    """
    experts, router = passes.experts, passes.rates("router")
    oracle = experts.max(axis=0)
    alone = np.where(chosen >= 0, experts[np.maximum(chosen, 0), np.arange(len(chosen))], 0.0)
    return Regret(
        oracle=float(oracle.mean()),
        router=float(router.mean()),
        chosen=float(alone.mean()),
        best_single=float(experts.mean(axis=1).max()),
        random=float(experts.mean()),
        regret=float((oracle - router).mean()),
        by_choice=float((oracle - alone).mean()),
        by_mixing=float((alone - router).mean()),
        per_task=oracle - router,
    )


def confusion(known: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(E + 1, E + 2) counts of tasks. Row: the expert chosen, the last one for nobody. Column: experts that pass the task, so a
    task counts once for each of them; then tasks that none passes; then all tasks of the row.

    known: (E, T) whether an expert passes a task. chosen: (T,).
    """
    experts = len(known)
    counts = np.zeros((experts + 1, experts + 2), dtype=int)
    for row in range(experts + 1):
        tasks = chosen == (row if row < experts else NOBODY)
        counts[row, :experts] = known[:, tasks].sum(axis=1)
        counts[row, experts] = (~known[:, tasks].any(axis=0)).sum()
        counts[row, experts + 1] = tasks.sum()
    return counts


def picked_wrong(known: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Places of the tasks that another expert passes and the chosen one does not. known: (E, T); chosen: (T,)."""
    own = np.where(chosen >= 0, known[np.maximum(chosen, 0), np.arange(len(chosen))], False)
    return np.flatnonzero(known.any(axis=0) & ~own)


def agreement(known: np.ndarray, chosen: np.ndarray) -> tuple[int, int]:
    """Tasks where the chosen expert passes, and tasks that any expert passes: (agreed, possible)."""
    possible = known.any(axis=0)
    return int(possible.sum()) - len(picked_wrong(known, chosen)), int(possible.sum())
