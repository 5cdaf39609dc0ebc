"""Pictures of one benchmark: who passes which category, what the router chose, who is like whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

BLUE, RED, GREY = "#1f5fa8", "#c62828", "#8a939c"
_MOST_NUMBERS = 20  # a heat map with more rows or columns has no room for numbers
_LONGEST = 28


def heat_map(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, span: tuple, title: str
) -> Figure:
    """A matrix as colours, with its numbers where there is room; None is grey.

    span: the values of the palest and the darkest colour; one that begins below 0 goes from red over white to blue.
    """
    numbers = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    high, wide = numbers.shape
    figure = Figure(figsize=(2.4 + 0.62 * wide, 1.5 + 0.42 * high), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#dfe3e6")
    palette = "RdBu" if span[0] < 0 else "Blues"
    picture = axes.imshow(numbers, cmap=palette, vmin=span[0], vmax=span[1], aspect="auto")
    if max(high, wide) <= _MOST_NUMBERS:
        _write_numbers(axes, numbers, span)
    axes.set_xticks(
        range(wide), [short(name) for name in columns], rotation=30 if wide > 3 else 0, ha="right" if wide > 3 else "center"
    )
    axes.set_yticks(range(high), [short(name) for name in rows])
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=0.9)
    return figure


def _write_numbers(axes: Any, numbers: np.ndarray, span: tuple) -> None:
    whole = np.array_equal(numbers[~np.isnan(numbers)] % 1, np.zeros((~np.isnan(numbers)).sum())) and span[1] > 1
    strong = max(abs(span[0]), abs(span[1]))
    for (row, column), value in np.ndenumerate(numbers):
        text = "" if np.isnan(value) else f"{value:.0f}" if whole else f"{value:.2f}"
        colour = "white" if abs(value) > 0.6 * strong else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def score_bars(scores: Mapping[str, Mapping[str, float]], marks: Mapping[str, float]) -> Figure:
    """pass@1 of each strategy with its interval; marks: name -> a value drawn as a line through all, as the oracle's."""
    names = list(scores)
    figure = Figure(figsize=(7.5, 1.2 + 0.34 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(names))[::-1]
    values = [scores[name]["value"] for name in names]
    colours = [BLUE if name.startswith("single:") else GREY for name in names]
    axes.barh(places, values, color=colours, height=0.62)
    for place, name in zip(places, names, strict=True):
        axes.plot([scores[name]["low"], scores[name]["high"]], [place, place], color="black", linewidth=1.2)
    for name, value in marks.items():
        axes.axvline(value, color=RED, linewidth=1.2, linestyle="--")
        axes.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=RED, fontsize=8)
    axes.set_yticks(places, [short(name) for name in names])
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("pass@1, with 95 % intervals over tasks")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def short(name: str) -> str:
    flat = "".join(character if character.isprintable() else "?" for character in name)
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 3]}..."


def figures(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Figure, str]]:
    """name -> picture and caption, of one benchmark; names: of the experts."""
    rows = found["categories"]["rows"]
    labels = [f"{row['category']} ({row['tasks']})" for row in rows]
    made = {"pass_at_1": _scores(found)}
    table = [[one["value"] for one in row["experts"]] for row in rows]
    caption = "pass@1 of each expert on each category; in brackets how many tasks it has."
    made["categories"] = heat_map(table, labels, names, span=(0, 1), title="expert by category"), caption
    if found["routing"] is not None:
        made["confusion"] = _confusion(found["routing"]["confusion"], names)
    redundancy = found["redundancy"]
    caption = "Tasks that both pass, as a share of those that at least one passes: 1 is the same tasks, 0 none in common."
    made["same_tasks"] = heat_map(redundancy["jaccard"], names, names, span=(0, 1), title="same tasks passed (Jaccard)"), caption
    caption = "Share of the prompts' positions at which both experts hold the same next token for the likeliest."
    made["same_tokens"] = heat_map(redundancy["same_choice"], names, names, span=(0, 1), title="same likeliest token"), caption
    return made


def _scores(found: Mapping[str, Any]) -> tuple[Figure, str]:
    caption = (
        "How much each strategy passes. The oracle is the best expert for every task, the bound of any choice of one expert."
    )
    return score_bars(found["strategies"], {"oracle": found["oracle"]["value"]}), caption


def _confusion(counts: list[list[int]], names: Sequence[str]) -> tuple[Figure, str]:
    """Without the row of "nobody" where it is empty."""
    rows = [*names, "(nobody)"] if counts[-1][-1] else list(names)
    shown = [row[:-1] for row in counts[: len(rows)]]
    span = (0, max(1, *(value for row in shown for value in row)))
    labels = [f"{name} ({row[-1]})" for name, row in zip(rows, counts, strict=False)]
    caption = "Rows: the expert that the router weighs most, with its number of tasks. Columns: experts that pass these tasks."
    return heat_map(shown, labels, [*names, "none passes"], span=span, title="chosen by passing (tasks)"), caption


def weight_figures(weights: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Figure, str]]:
    """name -> picture and caption, of the checkpoint's weights."""
    caption = (
        "Cosine of the angle between the experts' deltas: 1 is the same direction, 0 nothing in common; grey is not defined."
    )
    made = {"cosine": (heat_map(weights["cosine"], names, names, span=(-1, 1), title="likeness of deltas (cosine)"), caption)}
    caption = "Overlap of the subspaces that the deltas write to: 1 where one lies in the other, 0 where they are orthogonal."
    made["writes"] = heat_map(weights["writes"], names, names, span=(0, 1), title="overlap of outputs"), caption
    return made
