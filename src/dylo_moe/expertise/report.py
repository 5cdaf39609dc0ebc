"""The analysis for people: tables for the terminal, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dylo_moe.errors import one_line
from dylo_moe.expertise.figures import figures, short, weight_figures
from dylo_moe.pages import Page

Headers, Rows = list[str], list[list[Any]]
WORDS = """pass@1 is the share of tasks that are passed, by all tests that ran. The oracle is the best expert for every task,
chosen with hindsight; regret is what the router loses against it. It has two parts: by choice, because the router weighs another
expert most, and by mixing, because its mixture answers and not that expert alone. Intervals are of 95 %, over tasks."""


def print_analysis(document: Mapping[str, Any], console: Console) -> None:
    """Tables and remarks; the rest is in the JSON file and the page."""
    names = document["experts"]
    for benchmark, found in document["benchmarks"].items():
        console.print(f"\n{benchmark}: {found['tasks']} tasks", markup=False, highlight=False)
        for title, (headers, rows) in _tables(found, names).items():
            console.print(_rich(title, headers, rows))
    for line in remarks_of(document):
        console.print(f"note: {one_line(line)}", markup=False, highlight=False, soft_wrap=True)


def remarks_of(document: Mapping[str, Any]) -> list[str]:
    """All remarks, those of a benchmark with its name."""
    lines = [*document["warnings"], *document["remarks"]]
    return lines + [f"{name}: {line}" for name, found in document["benchmarks"].items() for line in found["remarks"]]


def build_page(document: Mapping[str, Any]) -> Page:
    """The whole analysis as a page."""
    names = document["experts"]
    page = Page("Expert analysis")
    page.paragraph(f"{document['checkpoint']} ({document['format']}), {len(names)} experts, {document['date']}.")
    page.paragraph(" ".join(WORDS.split()))
    for line in (*document["warnings"], *document["remarks"]):
        page.notice("note", line)
    for benchmark, found in document["benchmarks"].items():
        _add_benchmark(page, benchmark, found, names)
    page.heading("Weights")
    for figure, caption in weight_figures(document["weights"], names).values():
        page.figure(figure, caption)
    page.table(*weight_rows(document["weights"], names), caption="Pairs of experts by the angle between their deltas")
    return page


def _add_benchmark(page: Page, benchmark: str, found: Mapping[str, Any], names: Sequence[str]) -> None:
    page.heading(f"{benchmark}: {found['tasks']} tasks")
    for line in found["remarks"]:
        page.notice("note", line)
    for title, (headers, rows) in _tables(found, names).items():
        page.table(headers, rows, caption=title)
    for figure, caption in figures(found, names).values():
        page.figure(figure, caption)
    if found["routing"] is not None and found["routing"]["picked_wrong"]:
        page.table(
            *_picked(found["routing"]), caption="Tasks where the router weighs most an expert that fails while another passes"
        )
    page.table(*_redundant(found["redundancy"], names), caption="Pairs of experts by what they do")
    page.table(*_tasks(found), caption="Every task")


def _tables(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Headers, Rows]]:
    made = {"Strategies": _strategies(found), "Experts": _experts(found, names), "Categories": _categories(found, names)}
    if found["routing"] is not None:
        made["Router against oracle"] = _routing(found)
    return made


def _strategies(found: Mapping[str, Any]) -> tuple[Headers, Rows]:
    rows = [[name, score["value"], _span(score)] for name, score in found["strategies"].items()]
    return ["strategy", "pass@1", "95 % interval"], [*rows, ["oracle", found["oracle"]["value"], _span(found["oracle"])]]


def _experts(found: Mapping[str, Any], names: Sequence[str]) -> tuple[Headers, Rows]:
    headers = ["expert", "name", "pass@1", "95 % interval", "best on", "only one on", "router chose", "router's weight"]
    rows = []
    for one in found["experts"]:
        score, load = one["pass@1"], None if one["load"] is None else f"{one['load']:.1%}"
        counts = [one["best_on"], one["alone_on"], one["chosen_on"]]
        rows.append([one["expert"], short(names[one["expert"]]), score["value"], _span(score), *counts, load])
    against = [one["against_base"] for one in found["experts"]]
    if any(against):
        headers += ["above base", "p"]
        rows = [[*row, f"{it['difference']['value']:+.3f}", it["p"]] for row, it in zip(rows, against, strict=True)]
    return headers, rows


def _categories(found: Mapping[str, Any], names: Sequence[str]) -> tuple[Headers, Rows]:
    headers = ["category", "tasks", *(f"{expert}: {short(name)}" for expert, name in enumerate(names)), "best", "oracle"]
    headers += [] if found["routing"] is None else ["router", "router chose"]
    rows = []
    for row in found["categories"]["rows"]:
        best = ", ".join(str(expert) for expert in row["best"]) or "nobody"
        best += " (clearly)" if row["clear"] else ""
        scores = [f"{one['value']:.3f} {_span(one)}" for one in row["experts"]]
        cells = [row["category"], row["tasks"], *scores, best, row["oracle"]["value"]]
        if row["router"] is not None:
            cells += [row["router"]["value"], " ".join(f"{e}:{n}" for e, n in enumerate(row["chosen"]) if n) or "nobody"]
        rows.append(cells)
    return headers, rows


def _routing(found: Mapping[str, Any]) -> tuple[Headers, Rows]:
    it = found["routing"]
    regret = it["regret"]
    rows = [
        ["oracle: the best expert for every task", it["oracle"]],
        ["router", it["router"]],
        ["the expert that the router weighs most, alone", it["chosen"]],
        ["the best single expert", it["best_single"]],
        ["an expert by chance", it["random"]],
        ["regret (oracle - router)", f"{regret['value']:.4g} {_span(regret)}, p {regret['p']:.2g}"],
        ["... by choice (oracle - weighed most)", it["by_choice"]],
        ["... by mixing (weighed most - router)", it["by_mixing"]],
        ["weighed most passes, of tasks that any expert passes", f"{it['agreed']} of {it['possible']}"],
        ["same expert as the strategy best", f"{it['same_as_best']} of {found['tasks']}"],
        ["another expert for the answer than for the prompt", f"{it['moved']} of {found['tasks']}"],
    ]
    if found["best"] is not None:
        best = found["best"]
        rows.append(["regret of the strategy best", f"{best['regret']['value']:.4g} {_span(best['regret'])}"])
        rows.append(["best's expert passes, of tasks that any expert passes", f"{best['agreed']} of {best['possible']}"])
    return ["what", "value"], rows


def _picked(routing: Mapping[str, Any]) -> tuple[Headers, Rows]:
    rows = [[it["task_id"], _expert(it["chosen"]), _listed(it["passing"]), it["router"]] for it in routing["picked_wrong"]]
    return ["task", "router weighs most", "experts that pass", "router's own pass@1"], rows


def _redundant(found: Mapping[str, Any], names: Sequence[str]) -> tuple[Headers, Rows]:
    headers = ["experts", "same tasks (Jaccard)", "phi", "same likeliest token", "mean KL, there", "and back"]
    columns = [found[name] for name in ("jaccard", "phi", "same_choice", "divergence")]
    rows = [[f"{i} and {j}", *(c[i][j] for c in columns), found["divergence"][j][i]] for i, j in _pairs(len(names))]
    return headers, rows


def weight_rows(weights: Mapping[str, Any], names: Sequence[str]) -> tuple[Headers, Rows]:
    """Headers and one row per pair of experts. weights: from `document.describe_weights`."""
    rows = []
    for i, j in _pairs(len(names)):
        cells = [weights[name][i][j] for name in ("cosine", "reads", "writes")]
        norms = [weights["norms"][expert] for expert in (i, j)]
        rows.append([f"{i}: {short(names[i])}, {j}: {short(names[j])}", *(_or_undefined(cell) for cell in (*cells, *norms))])
    return ["experts", "cosine", "overlap of inputs", "overlap of outputs", "norm of the first", "of the second"], rows


def _tasks(found: Mapping[str, Any]) -> tuple[Headers, Rows]:
    headers = [
        "task",
        "category",
        "experts that pass",
        *(n for n in found["strategies"] if not n.startswith("single:")),
        "best chose",
    ]
    headers += [] if found["routing"] is None else ["router weighs most", "... for the prompt", "its weights"]
    rows = []
    for it in found["per_task"]:
        others = [rate for name, rate in it["rates"].items() if not name.startswith("single:")]
        cells = [it["task_id"], ", ".join(it["categories"]), _listed(it["passing"]), *others, it["best"]]
        if found["routing"] is not None:
            weights = it["prompt"] if it["answer"] is None else it["answer"]
            cells += [_expert(it["chosen"]), _expert(it["chosen_on_prompt"]), " ".join(f"{weight:.2f}" for weight in weights)]
        rows.append(cells)
    return headers, rows


def _rich(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for header in headers:  # as Text, because brackets in a name are no markup
        table.add_column(Text(one_line(header)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(_cell(cell))) for cell in row))
    return table


def _cell(cell: Any) -> str:
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _span(found: Mapping[str, float]) -> str:
    return f"[{found['low']:.3f}, {found['high']:.3f}]"


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(str(expert) for expert in experts) or "none"


def _expert(expert: int | None) -> str:
    return "nobody" if expert is None else str(expert)


def _or_undefined(value: float | None) -> float | str:
    return "not defined" if value is None else value
