"""The pictures of a routing analysis, each from its document alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#d55e00", "#8a939c"
COLOURS = "viridis"  # even steps for every kind of colour vision, and in grey
WIDTH = 10.0
LABELS = 44  # as many names as fit beside one another


def by_task(document: Mapping[str, Any]) -> Figure:
    """Expert x task, tasks with the same dominant expert beside one another."""
    experts = len(document["experts"])
    order = [experts if task["dominant"] is None else task["dominant"] for task in document["tasks"]]
    tasks = [document["tasks"][number] for number in np.argsort(order, kind="stable")]
    figure, axes = _figure(0.34 * experts + 2.2)
    _heat(figure, axes, np.array([task["share"] for task in tasks]).T)
    _name_experts(axes, document["experts"])
    _name(axes.set_xticks, [task["task"] for task in tasks], rotation=90)
    axes.set_xlabel("task")
    return figure


def by_position(document: Mapping[str, Any]) -> Figure:
    """Expert x position in the text, and below it how many tokens there are."""
    positions, experts = document["positions"], document["experts"]
    figure = Figure(figsize=(WIDTH, 0.34 * len(experts) + 2.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(len(experts) * 0.34, 1.0), 0.7])
    width, share = positions["width"], np.array(positions["share"])
    extent = (0, len(share) * width, len(experts) - 0.5, -0.5)
    _heat(figure, axes, share.T, extent=extent)
    _name_experts(axes, experts)
    below.bar(np.arange(len(share)) * width, positions["tokens"], width=width, align="edge", color=GREY)
    below.set_xlabel("position of the token, counted from the start of the prompt")
    below.set_ylabel("tokens")
    _plain(below)
    return figure


def by_layer(document: Mapping[str, Any]) -> Figure | None:
    """Layer x expert; None where all layers share their weights."""
    layers = document["layers"]
    if len(layers) == 1:
        return None
    figure, axes = _figure(min(0.17 * len(layers), 14.0) + 1.2)
    _heat(figure, axes, np.array([layer["share"] for layer in layers]))
    _name(axes.set_yticks, [layer["layer"] for layer in layers])
    experts = document["experts"]
    axes.set_xticks(range(len(experts)), [f"{number}" for number in range(len(experts))])
    axes.set_xlabel("expert")
    return figure


def load(document: Mapping[str, Any]) -> Figure:
    """Share of the weight of each expert, and how often it has the largest."""
    experts, balance = document["experts"], document["balance"]
    figure, axes = _figure(0.4 * len(experts) + 1.3)
    places = np.arange(len(experts))
    axes.barh(places - 0.19, balance["share"], height=0.36, color=BLUE, label="mean share of the weight")
    axes.barh(places + 0.19, balance["first"], height=0.36, color=ORANGE, label="share of tokens where it is the largest")
    axes.axvline(1 / len(experts), color=GREY, linewidth=1.2, linestyle="--", label="all alike")
    axes.set_ylim(len(experts) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    _name_experts(axes, experts)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    _plain(axes)
    return figure


def decisions(document: Mapping[str, Any]) -> Figure:
    """How sure the router is: distributions of the largest share and of the entropy, before the choice of the top k too."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    titles = {"confidence": "largest share (confidence)", "entropy": "entropy, as a part of the largest possible"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for key, colour, label in (
            ("decision", BLUE, "as used"),
            ("decision_before_top_k", ORANGE, "before the choice of the top k"),
        ):
            if document[key] is not None:
                _distribution(axes, document[key][name], colour, label)
        axes.set_xlabel(title)
        axes.set_ylabel("share of tokens")
        axes.set_xlim(0, 1)
        _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def _distribution(axes: Axes, found: Mapping[str, Any], colour: str, label: str) -> None:
    counts = np.array(found["counts"], float)
    axes.stairs(counts / max(counts.sum(), 1), found["edges"], fill=True, color=colour, alpha=0.35)
    axes.stairs(counts / max(counts.sum(), 1), found["edges"], color=colour, linewidth=1.4, label=label)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _heat(figure: Figure, axes: Axes, values: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=COLOURS, vmin=0.0, extent=extent)
    image.set_clim(0.0, max(float(values.max()), 1e-9))
    figure.colorbar(image, ax=axes, label="share of the weight", pad=0.01)


def _name_experts(axes: Axes, experts: Sequence[str]) -> None:
    axes.set_yticks(range(len(experts)), [short(f"{number}: {name}", 28) for number, name in enumerate(experts)])


def _name(set_ticks: Callable[..., object], names: Sequence[str], **style: object) -> None:
    """Names along an axis, as many as fit. set_ticks: axes.set_xticks or axes.set_yticks."""
    step = -(-len(names) // LABELS)
    places = range(0, len(names), step)
    set_ticks(places, [short(names[place], 40) for place in places], fontsize=8, **style)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def short(name: str, limit: int) -> str:
    """A name for a picture: printable, and its end where it is long, which tells names apart."""
    flat = "".join(char if char.isprintable() else "?" for char in name)
    return flat if len(flat) <= limit else f"...{flat[3 - limit :]}"
