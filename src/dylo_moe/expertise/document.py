"""Everything that is known of the experts on one benchmark, as plain values for JSON, tables and pictures.

Shapes: E experts, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dylo_moe.expertise import answers, choices
from dylo_moe.expertise.categories import Categories
from dylo_moe.expertise.observing import Observed, loads
from dylo_moe.expertise.passes import HALF, Passes, best_of, dispensable, winners
from dylo_moe.expertise.weights import WeightSimilarity
from dylo_moe.statistics import Estimate, compare, holm, mean_interval

LEVEL = 0.05  # of the corrected p of "this expert is the best of its category"


def describe(passes: Passes, categories: Categories, observed: Mapping[str, Observed], names: Sequence[str]) -> dict[str, Any]:
    """One benchmark. The keys are stable; new ones may be added. Experts are numbers, 0 to E - 1; `null` is "not defined".

    tasks, samples: how many tasks, and samples of each. passes_means: when an expert counts as passing a task.
    strategies: {strategy: estimate of pass@1}; an estimate is {value, low, high}, the interval being of 95 % over tasks.
    oracle: estimate of the pass@1 of the best expert for every task.
    experts: [{expert, name, pass@1: estimate, best_on: tasks where none is better and it passes, alone_on: tasks that no other
        expert passes, chosen_on: tasks where the router weighs it most, load: its mean share of the router's weights,
        against_base: null or {difference: estimate, p}}].
    categories: {source, notes, rows: [{category, tasks, experts: [estimate], best: [expert], clear: whether one expert is better
        than each other by paired tests, corrected for all of them (Holm), router: estimate or null, oracle: estimate,
        chosen: [tasks where the router weighs this expert most]}]}.
    routing: null without a router, or see `_routing`. best: as the router's, of the strategy "best": {regret, agreed, possible}.
    redundancy: {jaccard, phi: of the tasks passed, divergence: mean KL of next-token distributions on the prompts in nats, row
        against column, same_choice: share of positions with the same likeliest token: all (E, E); positions: how many were
        compared; dispensable: {alone: experts any one of which could go, together: a set that could}}.
    per_task: [{task_id, categories, rates: {strategy: share of samples that pass}, passing: [expert], chosen, chosen_on_prompt,
        chosen_on_answer: expert or null, best: expert chosen by "best", prompt, answer: the router's weights or null}].
    """
    chosen = np.array([observed[task].chosen for task in passes.tasks])
    return {
        "tasks": len(passes.tasks),
        "samples": {name: int(counts.max()) for name, counts in passes.samples.items()},
        "passes_means": "at least half of its samples pass" if passes.samples["single:0"].max() > 1 else "its sample passes",
        "strategies": {name: estimate(passes.rates(name)) for name in passes.strategies},
        "oracle": estimate(passes.experts.max(axis=0)),
        "experts": _experts(passes, chosen, list(observed.values()), names),
        "categories": {"source": categories.source, "notes": list(categories.notes), "rows": _rows(passes, categories, chosen)},
        "routing": _routing(passes, chosen, observed) if "router" in passes.passed else None,
        "best": _best(passes, observed) if "best" in passes.passed else None,
        "redundancy": _redundancy(passes, list(observed.values())),
        "per_task": [_task(passes, index, categories, observed[task]) for index, task in enumerate(passes.tasks)],
    }


def estimate(values: np.ndarray) -> dict[str, float]:
    return shown(mean_interval(values))


def shown(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def matrix(values: np.ndarray) -> list:
    """Nested lists, with None for NaN, which JSON does not have."""
    return [matrix(row) for row in values] if values.ndim > 1 else [None if math.isnan(v) else float(v) for v in values]


def _experts(passes: Passes, chosen: np.ndarray, observed: list[Observed], names: Sequence[str]) -> list[dict[str, Any]]:
    best, share = winners(passes), loads(observed)
    return [
        {
            "expert": expert,
            "name": name,
            "pass@1": estimate(rates),
            "best_on": sum(expert in found for found in best),
            "alone_on": int((passes.known[expert] & (passes.known.sum(axis=0) == 1)).sum()),
            "chosen_on": int((chosen == expert).sum()) if share is not None else None,
            "load": None if share is None else float(share[expert]),
            "against_base": _against(passes.rates("base"), rates) if "base" in passes.passed else None,
        }
        for expert, (name, rates) in enumerate(zip(names, passes.experts, strict=True))
    ]


def _against(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    found = compare(first, second)
    return {"difference": shown(found.difference), "p": found.p}


def _rows(passes: Passes, categories: Categories, chosen: np.ndarray) -> list[dict[str, Any]]:
    places = {name: passes.rows(categories.tasks(name)) for name in categories.names}
    clear = _clear({name: passes.experts[:, rows] for name, rows in places.items()})
    routed = "router" in passes.passed
    return [
        {
            "category": name,
            "tasks": len(rows),
            "experts": [estimate(rates) for rates in passes.experts[:, rows]],
            "best": best_of(passes.experts[:, rows]).experts,
            "clear": clear[name],
            "router": estimate(passes.rates("router")[rows]) if routed else None,
            "oracle": estimate(passes.experts[:, rows].max(axis=0)),
            "chosen": [int((chosen[rows] == expert).sum()) for expert in range(passes.num_experts)] if routed else None,
        }
        for name, rows in places.items()
    ]


def _clear(rates: Mapping[str, np.ndarray]) -> dict[str, bool]:
    """Whether the best expert of a category is better than each other one. All pairs of experts in all categories are tested
    and corrected together, because who is the best was found with the same numbers. rates: category -> (E, T)."""
    pairs = [(name, i, j) for name, found in rates.items() for i, j in combinations(range(len(found)), 2)]
    tested = holm([compare(rates[name][i], rates[name][j]).p for name, i, j in pairs])
    p = dict(zip(pairs, tested, strict=True))
    clear = {}
    for name, found in rates.items():
        best = best_of(found).experts
        rivals = [p[name, *sorted((best[0], other))] for other in range(len(found)) if other != best[0]] if best else []
        clear[name] = bool(rivals) and all(value < LEVEL for value in rivals)
    return clear


def _routing(passes: Passes, chosen: np.ndarray, observed: Mapping[str, Observed]) -> dict[str, Any]:
    """What the router chose against what would have been best; see `choices.Regret` for the words.

    oracle, router, chosen, best_single, random: pass@1. regret: {value, low, high, p}: oracle - router. by_choice, by_mixing: its
    two parts. agreed, possible: tasks where the expert chosen passes, and tasks that any passes. nobody: tasks without a
    heaviest expert. same_as_best: tasks where the strategy "best" chooses the same. moved: tasks where prompt and answer have
    different heaviest experts. confusion: (E + 1, E + 2), see `choices.confusion`. picked_wrong: [{task_id, chosen, passing}].
    beyond: tasks that the router passes and no expert does.
    """
    found = choices.regret(passes, chosen)
    compared = compare(passes.rates("router"), passes.experts.max(axis=0))
    agreed, possible = choices.agreement(passes.known, chosen)
    seen = [observed[task] for task in passes.tasks]
    names = ("oracle", "router", "chosen", "best_single", "random", "by_choice", "by_mixing")
    beyond = (passes.rates("router") >= HALF) & ~passes.known.any(axis=0)
    return {
        **{name: getattr(found, name) for name in names},
        "regret": {**shown(compared.difference), "p": compared.p},
        "agreed": agreed,
        "possible": possible,
        "nobody": int((chosen == choices.NOBODY).sum()),
        "same_as_best": sum(int(one.best == expert) for one, expert in zip(seen, chosen, strict=True)),
        "moved": sum(one.moved for one in seen),
        "confusion": choices.confusion(passes.known, chosen).tolist(),
        "picked_wrong": [_picked(passes, index, chosen) for index in choices.picked_wrong(passes.known, chosen)],
        "beyond": [passes.tasks[index] for index in np.flatnonzero(beyond)],
    }


def _picked(passes: Passes, index: int, chosen: np.ndarray) -> dict[str, Any]:
    return {
        "task_id": passes.tasks[index],
        "chosen": _number(chosen[index]),
        "passing": np.flatnonzero(passes.known[:, index]).tolist(),
        "router": float(passes.rates("router")[index]),
    }


def _best(passes: Passes, observed: Mapping[str, Observed]) -> dict[str, Any]:
    best = np.array([observed[task].best for task in passes.tasks])
    agreed, possible = choices.agreement(passes.known, best)
    compared = compare(passes.rates("best"), passes.experts.max(axis=0))
    return {"regret": {**shown(compared.difference), "p": compared.p}, "agreed": agreed, "possible": possible}


def _redundancy(passes: Passes, observed: list[Observed]) -> dict[str, Any]:
    positions = np.array([one.positions for one in observed])
    alone, together = dispensable(passes)

    def mean(name: str) -> list:
        """Over all positions of all tasks."""
        return matrix(np.average([getattr(one, name) for one in observed], axis=0, weights=positions))

    return {
        "jaccard": matrix(answers.jaccard(passes.known)),
        "phi": matrix(answers.phi(passes.known)),
        "divergence": mean("divergence"),
        "same_choice": mean("same_choice"),
        "positions": int(positions.sum()),
        "dispensable": {"alone": alone, "together": together},
    }


def _task(passes: Passes, index: int, categories: Categories, seen: Observed) -> dict[str, Any]:
    task = passes.tasks[index]
    return {
        "task_id": task,
        "categories": list(categories.of[task]),
        "rates": {name: float(passes.rates(name)[index]) for name in passes.strategies},
        "passing": np.flatnonzero(passes.known[:, index]).tolist(),
        "chosen": _number(seen.chosen),
        "chosen_on_prompt": _number(seen.chosen_on_prompt),
        "chosen_on_answer": _number(seen.chosen_on_answer),
        "best": seen.best,
        "prompt": None if seen.prompt is None else seen.prompt.tolist(),
        "answer": None if seen.answer is None else seen.answer.tolist(),
    }


def _number(expert: int) -> int | None:
    return None if expert == choices.NOBODY else int(expert)


def describe_weights(found: WeightSimilarity, without_effect: Sequence[int]) -> dict[str, Any]:
    """How alike the experts' weights are, for JSON: see WeightSimilarity. undefined: {expert: why}; without_effect: experts that
    change nothing."""
    return {
        "norms": matrix(found.norms),
        "cosine": matrix(found.cosine),
        "reads": matrix(found.reads),
        "writes": matrix(found.writes),
        "by_module": {module: matrix(cosine) for module, cosine in found.by_module.items()},
        "undefined": found.reasons,
        "without_effect": list(without_effect),
    }
