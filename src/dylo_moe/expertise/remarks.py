"""What the numbers mean, in plain words: what to do something about first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALIKE = 0.95  # cosine of deltas from which on two experts are called nearly the same
LITTLE = 0.1  # of an expert's fair share of the router's weight: below, it hardly speaks
MOST = 0.9  # of the tasks: a router that sends as many to one expert
FEW_TASKS = 30


def weight_remarks(weights: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of the checkpoint alone. weights: from `document.describe_weights`; names: of the experts."""
    lines = [f"{called(e, names)} changes nothing: all of its deltas are zero" for e in weights["without_effect"]]
    for i, row in enumerate(weights["cosine"]):
        for j, cosine in enumerate(row[:i]):
            if cosine is not None and cosine >= ALIKE:
                lines.append(
                    f"{called(j, names)} and {called(i, names)} are nearly the same: the cosine of their deltas is {cosine:.3f}"
                )
    for name, reason in weights["undefined"].items():
        lines.append(f"no likeness of the weights of {name}: {reason}")
    return lines


def benchmark_remarks(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of one benchmark. found: from `document.describe`."""
    return [*_of_experts(found, names), *_of_router(found, names), *_of_tasks(found)]


def _of_experts(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    experts, spare = found["experts"], found["redundancy"]["dispensable"]
    if not any(expert["best_on"] for expert in experts):
        return ["no expert passes any task, so nothing can be said about who is good at what"]
    lines = [f"{called(e['expert'], names)} passes no task" for e in experts if e["pass@1"]["value"] == 0]
    never = [e["expert"] for e in experts if not e["best_on"] and e["pass@1"]["value"] > 0]
    lines += [
        f"{called(expert, names)} is never the best: another one does better on every task that it passes" for expert in never
    ]
    if spare["together"]:
        listed = ", ".join(called(expert, names) for expert in spare["together"])
        lines.append(f"could go without a task being lost: {listed} (on these tasks; the router would have to learn anew)")
    return lines


def _of_router(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    routing, tasks = found["routing"], found["tasks"]
    if routing is None:
        return ["the checkpoint has no router, so there is nothing to say about its choices"]
    lines, fair = [], 1 / len(names)
    for expert in found["experts"]:
        who = called(expert["expert"], names)
        if expert["load"] == 0:
            lines.append(f"{who} is never routed to: its weight is zero on every token")
        elif expert["load"] < LITTLE * fair:
            lines.append(f"{who} is hardly routed to: {expert['load']:.2%} of the weight, and a fair share is {fair:.0%}")
        if len(names) > 1 and expert["chosen_on"] >= MOST * tasks:
            lines.append(f"the router weighs {who} most on {expert['chosen_on']} of {tasks} tasks")
    if routing["nobody"]:
        lines.append(f"on {routing['nobody']} of {tasks} tasks no expert has more weight than every other")
    return lines + _of_regret(routing)


def _of_regret(routing: Mapping[str, Any]) -> list[str]:
    regret, lines = routing["regret"], []
    span = f"{regret['value']:.3f} (95 % interval {regret['low']:.3f} to {regret['high']:.3f})"
    if routing["picked_wrong"]:
        many = len(routing["picked_wrong"])
        lines.append(f"on {many} of {routing['possible']} tasks that an expert passes, the router weighs most one that does not")
    if regret["value"] > 0 and regret["low"] > 0:
        lines.append(f"the right expert for every task would score more than the router does: regret {span}")
    if routing["router"] < routing["best_single"]:
        lines.append(f"the best expert alone scores {routing['best_single']:.3f}, more than the router's {routing['router']:.3f}")
    if routing["beyond"]:
        lines.append(f"the mixture passes {len(routing['beyond'])} tasks that no expert passes alone")
    return lines


def _of_tasks(found: Mapping[str, Any]) -> list[str]:
    lines = list(found["categories"]["notes"])
    if found["tasks"] < FEW_TASKS:
        lines.append(f"only {found['tasks']} tasks: the intervals are wide")
    if max(found["samples"].values()) > 1:
        lines.append("the oracle is the largest of several noisy rates, so with few samples per task it is too high by chance")
    return lines


def called(expert: int, names: Sequence[str]) -> str:
    """What an expert is called: its number, and its name where that says more."""
    return f"expert {expert}" if names[expert] in (f"expert_{expert}", str(expert)) else f"expert {expert} ({names[expert]})"
