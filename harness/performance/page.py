"""The page docs/performance.md and its pictures, from the cells that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from harness.pictures import BLUE, GREY, RED, SETTINGS

PICTURES = "performance"
_HEAD = """# Performance

What a routed pass costs beside the base pass and its peers. Every figure is the median ratio of interleaved pairs of CPU time
(on a GPU of time between CUDA events) in one run, with its 95 % bootstrap bounds; counted ratios have none. "Limit" is what the
shapes demand, by counted operations (bytes for generation): base + 2 r (in + out) for each active expert and token, three times
that for a training step; of memory beside the loop's, the base's own step, less than which no step takes. Measured by `tox -e
bench`, between two tests of the clock that refuse a machine on which a product does not take as long as itself.
`performance/performance.json` has every pair, in pytest-benchmark's format. The load average says how busy the machine was with
other work: bounds widen with it, and small passes suffer most. Cells that the command knows and this page lacks have not been
measured. What these random models write repeats itself more than code does: with features `base`, which X-LoRA has, more can be
guessed ahead than elsewhere; where nothing can be ("wrong guesses") a token costs two passes.
"""


def write_page(document: Mapping, target: Path) -> None:
    """Writes target/performance.md and target/performance/*.svg."""
    pictures = target / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    cells = sorted(document["benchmarks"], key=lambda cell: cell["group"])
    lines = [_HEAD, _summary(cells), _machine(document), ""]
    for group, of_group in groupby(cells, key=lambda cell: cell["group"]):
        found = list(of_group)
        name = f"{''.join(c if c.isalnum() else '-' for c in group)}.svg"
        _picture(found, pictures / name)
        lines += [f"## {group}", "", *_table(found), "", f"![{group}]({PICTURES}/{name})", ""]
    (target / "performance.md").write_text("\n".join(lines), encoding="utf-8")


def _summary(cells: list[dict]) -> str:
    facts = [cell["extra_info"] for cell in cells]
    reached = sum(fact["reached"] for fact in facts)
    unsure = sum(not fact["sure"] for fact in facts)
    return f"{reached} of {len(facts)} goals are reached; in {unsure} cells the interval holds both answers.\n"


def _machine(document: Mapping) -> str:
    machine, facts = document["machine_info"], [cell["extra_info"] for cell in document["benchmarks"]]
    threads = ", ".join(sorted({str(fact["threads"]) for fact in facts}))
    loads = [fact["load"] for fact in facts]
    commits = ", ".join(sorted({str(fact["commit"])[:10] for fact in facts}))
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return (
        f"Machine: {device}{machine['processor']}, {machine['cores']} cores, {machine['system']}; {versions}; "
        f"{threads} intra-op threads; load average {min(loads):g} to {max(loads):g}; commits {commits}.\n"
    )


def _table(cells: Iterable[dict]) -> list[str]:
    lines = ["| cell | ratio | 95 % bounds | limit | goal | |", "|---|---|---|---|---|---|"]
    for cell in cells:
        fact = cell["extra_info"]
        bounds = "counted" if not fact["ratios"] else f"{fact['low']:.3f} - {fact['high']:.3f}"
        limit = "" if fact["limit"] is None else f"{fact['limit']:.3f}"
        goal = f"{'at least' if fact['at_least'] else 'at most'} {fact['goal']:.3f}"
        verdict = ("reached" if fact["reached"] else "**missed**") + ("" if fact["sure"] else ", unsure")
        note = f" ({fact['note']})" if fact.get("note") else ""  # cells that were kept earlier have none
        lines.append(f"| {cell['name']}{note} | {fact['ratio']:.3f} | {bounds} | {limit} | {goal} | {verdict} |")
    return lines


def _picture(cells: list[dict], path: Path) -> None:
    """Every cell's pairs, median, limit and goal."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 1.0 + 0.32 * len(cells)), layout="constrained")
        axes = figure.add_subplot()
        for place, cell in enumerate(reversed(cells)):
            fact = cell["extra_info"]
            axes.scatter(fact["ratios"], [place] * len(fact["ratios"]), color=GREY, s=8, alpha=0.5)
            axes.plot([fact["low"], fact["high"]], [place, place], color=BLUE, linewidth=2)
            axes.scatter([fact["ratio"]], [place], color=BLUE, s=24, zorder=3)
            axes.scatter([fact["goal"]], [place], color=RED, marker="|", s=120, zorder=3)
            if fact["limit"] is not None:
                axes.scatter([fact["limit"]], [place], color="black", marker="|", s=120, zorder=2)
        axes.set_yticks(range(len(cells)), [cell["name"] for cell in reversed(cells)])
        axes.set_xlabel("ratio: pairs in grey, median and bounds in blue, goal in red, limit in black")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
