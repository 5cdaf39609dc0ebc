"""The report's pictures, each as one inline SVG made from a verdict document; "" where there is nothing to show."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib

from harness.verdict import number

BLUE, RED, GREY = "#1f5fa8", "#c62828", "#8a939c"
# Below this share of its bound a comparison is drawn at the left edge; zero has no place on a logarithmic axis.
LEFT_EDGE = 1e-6
SETTINGS = {
    "text.parse_math": False,  # names are data: a dollar sign in a path is not a formula
    "svg.fonttype": "path",
    "svg.hashsalt": "validate_moe",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


def required_tolerances(verdict: Mapping) -> str:
    """The share of its bound that each check needed, on the checkpoint where it needed most."""
    needed: dict[str, float] = {}
    for checkpoint in verdict["checkpoints"]:
        for check in checkpoint["checks"]:
            if "required_tolerance" in check["evidence"]:
                share = number(check["evidence"]["required_tolerance"])
                needed[check["id"]] = max(needed.get(check["id"], 0.0), math.inf if math.isnan(share) else share)
    if not needed:
        return ""
    labels, shares = zip(*sorted(needed.items(), reverse=True), strict=True)
    largest = max(10.0, *(share for share in shares if math.isfinite(share)), 1.0)
    places = [min(max(share, LEFT_EDGE), largest) for share in shares]
    with _figure(len(labels)) as (figure, axes):
        axes.scatter(places, range(len(labels)), c=[RED if share > 1 else BLUE for share in shares], s=22, zorder=3)
        axes.axvline(1.0, color=GREY, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # the default writes powers as formulas, which are switched off
        _label(axes, labels, "share of the bound that would have passed (1: the bound itself)")
        return _svg(figure)


def ratios(verdict: Mapping) -> str:
    """Every ratio of time, work and memory with its 95 % bounds and its limit."""
    rows = [
        (f"{checkpoint['name']}: {name}", found)
        for checkpoint in verdict["checkpoints"]
        for check in checkpoint["checks"]
        for name, found in check["evidence"].get("ratios", {}).items()
        if math.isfinite(number(found["ratio"]))
    ]
    if not rows:
        return ""
    with _figure(len(rows)) as (figure, axes):
        for place, (_, found) in enumerate(reversed(rows)):
            value = number(found["ratio"])
            low, high = number(found.get("low", value)), number(found.get("high", value))
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2)
            axes.scatter([value], [place], color=BLUE, s=22, zorder=3)
            if "limit" in found:
                axes.scatter([number(found["limit"])], [place], color=RED, marker="|", s=90, zorder=3)
        _label(axes, [label for label, _ in reversed(rows)], "ratio, its 95 % bounds, and its limit in red")
        return _svg(figure)


def drift(verdict: Mapping) -> str:
    """How far single-pass mixing is from multi-pass mixing, per checkpoint and measure."""
    rows = [
        (f"{checkpoint['name']}: {name}", number(value))
        for checkpoint in verdict["checkpoints"]
        for name, value in checkpoint["drift"].items()
        if math.isfinite(number(value))
    ]
    if not rows:
        return ""
    labels, values = zip(*reversed(rows), strict=True)
    with _figure(len(rows)) as (figure, axes):
        axes.barh(range(len(rows)), values, color=BLUE, height=0.6)
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        _label(axes, labels, "drift")
        return _svg(figure)


class _figure:
    """A figure with one row per entry, made without pyplot's global state and with its settings restored after."""

    def __init__(self, rows: int) -> None:
        self._height = 0.9 + 0.22 * rows
        self._settings = matplotlib.rc_context(SETTINGS)

    def __enter__(self) -> tuple:
        from matplotlib.figure import Figure

        self._settings.__enter__()
        figure = Figure(figsize=(10, self._height), layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *error: object) -> None:
        self._settings.__exit__(*error)


def _label(axes: object, labels: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set_xlabel(title)
    axes.grid(axis="x", color="#e4e7ea")
    axes.set_axisbelow(True)


def _short(label: str, limit: int = 90) -> str:
    flat = "".join(character if character.isprintable() else "?" for character in label)
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def _svg(figure: object) -> str:
    """The <svg> element alone: an XML declaration has no place inside HTML."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
