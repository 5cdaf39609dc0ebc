"""The picture of a benchmark: scores with their intervals, and tasks won and lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED = "#1f5fa8", "#c62828"
_ROW = 0.36  # inches
_LONGEST = 28


def picture(document: Mapping[str, Any]) -> Figure:
    """One row for each benchmark: pass@1 of every run, and how each does against the first run, task by task."""
    benchmarks = document["benchmarks"]
    heights = [1.1 + _ROW * len(found["runs"]) for found in benchmarks.values()]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subplots(len(benchmarks), 2, squeeze=False, height_ratios=heights)
    for (left, right), (name, found) in zip(rows, benchmarks.items(), strict=True):
        _scores(left, found["runs"], found["parts"][-1])
        left.set_title(f"{name}: pass@1 of {len(found['tasks'])} tasks", fontsize=10)
        _won_and_lost(right, found)
    return figure


def _scores(axes: Axes, runs: Mapping[str, Any], part: str) -> None:
    for place, run in enumerate(reversed(runs.values())):
        found = run["pass_at_k"][part]["pass@1"]
        axes.plot([found["low"], found["high"]], [place, place], color=BLUE, linewidth=2)
        axes.plot([found["value"]], [place], "o", color=BLUE, markersize=6)
        axes.annotate(
            f"{found['value']:.3f}", (found["value"], place), (0, 5), textcoords="offset points", fontsize=8, ha="center"
        )
    axes.set_yticks(range(len(runs)), [_short(name) for name in reversed(runs)])
    axes.set_ylim(-0.6, len(runs) - 0.3)
    axes.set_xlim(-0.02, 1.02)
    _plain(axes)


def _won_and_lost(axes: Axes, found: Mapping[str, Any]) -> None:
    """Bars to the right for tasks won against the first run, to the left for tasks lost."""
    first = next(iter(found["runs"]))
    against = [c for c in found["comparisons"] if c["first"] == first]
    if not against:
        axes.set_axis_off()
        return
    for place, c in enumerate(reversed(against)):
        won, lost = len(c["won"]), len(c["lost"])
        axes.barh([place, place], [won, -lost], color=[BLUE, RED], height=0.55)
        axes.annotate(f" {won}", (won, place), va="center", fontsize=8)
        axes.annotate(f"{lost} ", (-lost, place), va="center", ha="right", fontsize=8)
    most = max(1, *(max(len(c["won"]), len(c["lost"])) for c in against))
    axes.set_xlim(-1.15 * most - 0.5, 1.15 * most + 0.5)
    axes.set_xticks([])
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{_short(c['second'])}\n{c['verdict']}" for c in reversed(against)]
    axes.set_yticks(range(len(against)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(against) - 0.3)
    axes.set_title(f"tasks lost and won against {_short(first)}", fontsize=10)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
