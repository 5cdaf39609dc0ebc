"""A benchmark's document for people: tables on the terminal, and one page that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dylo_moe.benchmarks.document import SAME, UNDECIDABLE
from dylo_moe.benchmarks.figures import picture
from dylo_moe.errors import one_line
from dylo_moe.pages import Page
from dylo_moe.statistics import fewest_tasks

TESTS = {"base": "base tests", "plus": "base + extra tests"}
_PRINTED = 10  # lines of a kind on the terminal; the page has all
WORDS = """pass@k is the chance that at least one of k samples of a task passes, mean over the tasks, with its 95 % interval. Two
runs are compared task by task, by all tests that ran: a task is won where the second run passes more of its samples, lost where
it passes fewer. p is the chance of a difference as large where neither run is better. p (Holm) is p raised because several pairs
were looked at; below 0.05 the second run is called better or worse. The interval of a difference is of its pair alone."""


def print_benchmarks(document: Mapping[str, Any], console: Console) -> None:
    """Scores and comparisons; the rest is in the JSON file and the page."""
    for name, found in document["benchmarks"].items():
        console.print(_table(f"{name}: {len(found['tasks'])} tasks", score_headers(found), score_rows(found)))
        if found["comparisons"]:
            console.print(_table(f"{name}: task by task", COMPARISON_HEADERS, comparison_rows(found)))
        lines = difference_lines(found)
        for line in [*lines[:_PRINTED], *([f"... and {len(lines) - _PRINTED} more"] if len(lines) > _PRINTED else [])]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for kind, line in remarks(document):
        console.print(f"{kind}: {line}", markup=False, highlight=False, soft_wrap=True)


def build_page(document: Mapping[str, Any]) -> Page:
    """The whole benchmark as a page."""
    page = Page("Benchmark")
    command = document["command"]
    page.paragraph(f"{command['checkpoint']}, {document['date']}. Samples: {_decoding(command)}.")
    page.paragraph(" ".join(WORDS.split()))
    for kind, line in remarks(document):
        page.notice(kind, line)
    page.figure(picture(document), "pass@1 with 95 % intervals; tasks that each run wins and loses against the first one")
    for name, found in document["benchmarks"].items():
        _add_benchmark(page, name, found)
    page.heading("How it was made")
    page.table(["option", "value"], [[key, _shown(value)] for key, value in command.items()])
    page.table(["package", "version"], document["versions"].items())
    page.table(["files", "SHA-256"], document["identity"].items())
    return page


def _add_benchmark(page: Page, name: str, found: Mapping[str, Any]) -> None:
    page.heading(f"{name}: {len(found['tasks'])} tasks")
    page.table(score_headers(found), score_rows(found), "Scores")
    if found["comparisons"]:
        page.table(COMPARISON_HEADERS, comparison_rows(found), "Task by task: the second run against the first")
        rows = [[_against(c), ", ".join(c["won"]), ", ".join(c["lost"])] for c in found["comparisons"]]
        page.table(["runs", "tasks won", "tasks lost"], rows, "Which tasks")
    lines = difference_lines(found)
    if lines:
        page.table(["EvalPlus 0.3.1 judges otherwise"], [[line] for line in lines])
    page.table(["task", *found["runs"]], task_rows(found), "Samples that pass, by all tests that ran")
    page.paragraph(_speed(found["generation"]))


def score_headers(found: Mapping[str, Any]) -> list[str]:
    return ["run", "", *(TESTS[part] for part in found["parts"]), "EvalPlus 0.3.1"]


def score_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row for each run and k. EvalPlus's own value is that of the last column before it."""
    rows = []
    last = found["parts"][-1]
    for name, run in found["runs"].items():
        for k in run["pass_at_k"][last]:
            stock = run["stock"][last].get(k)
            values = [_estimate(run["pass_at_k"][part][k]) for part in found["parts"]]
            rows.append([name, k, *values, "" if stock is None else f"{stock:.3f}"])
    return rows


COMPARISON_HEADERS = ["runs", "difference", "won", "lost", "tied", "p", "p (Holm)", "verdict"]


def comparison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            _against(c),
            _estimate(c["difference"], sign="+"),
            str(len(c["won"])),
            str(len(c["lost"])),
            str(c["tied"]),
            _p(c["p"]),
            _p(c["p_holm"]),
            c["verdict"],
        ]
        for c in found["comparisons"]
    ]


def task_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row for each task: how many of a run's samples pass all tests that ran."""
    last = found["parts"][-1]
    runs = [run["per_task"] for run in found["runs"].values()]
    return [[task, *(f"{run[task][last]} of {run[task]['samples']}" for run in runs)] for task in found["tasks"]]


def difference_lines(found: Mapping[str, Any]) -> list[str]:
    """Samples that EvalPlus's checker judges otherwise, and why."""
    lines = []
    for name, run in found["runs"].items():
        for d in run["differences"]:
            where = f"{name}: {d['task_id']} sample {d['sample']} ({TESTS[d['tests']]})"
            lines.append(one_line(f"{where}: {d['ours']}, in EvalPlus 0.3.1 {d['stock']}: {d['reason']}"))
    return lines


def remarks(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know before drawing conclusions: "warning" or "note", and a sentence."""
    lines = []
    if "none" in document["sandbox"]:
        lines.append(("warning", "generated code ran without a sandbox, so it could have changed its own score"))
    for name, found in document["benchmarks"].items():
        verdicts = {c["verdict"] for c in found["comparisons"]}
        if UNDECIDABLE in verdicts:
            needed = f"{len(found['comparisons'])} comparisons need at least {fewest_tasks(len(found['comparisons']))} tasks"
            lines.append(("warning", f"{name}: with {len(found['tasks'])} tasks no outcome could be significant: {needed}"))
        elif SAME in verdicts:
            smallest = min(c["detectable"] for c in found["comparisons"] if c["verdict"] == SAME)
            needed = f"a difference would show from about {smallest:.2f} on"
            lines.append(("note", f"{name}: not significant does not mean equal: {needed}"))
    return lines


def _against(comparison: Mapping[str, Any]) -> str:
    return f"{comparison['second']} against {comparison['first']}"


def _estimate(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _decoding(command: Mapping[str, Any]) -> str:
    if command["greedy"]:
        return "greedy"
    return f"{command['n_samples']} of each task at temperature {command['temperature']:g}, seed {command.get('seed', 0)}"


def _speed(generation: Mapping[str, Any]) -> str:
    scored = f"Scored in {generation['scoring_seconds']:.1f} s."
    if not generation["new_samples"]:
        return f"All samples were there already. {scored}"
    made = f"{generation['new_samples']} samples in {generation['seconds']:.1f} s, with loading the model"
    return f"{made}: {generation['samples_per_second']:.2f} a second. {scored}"


def _table(title: str, headers: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table
