"""The analysis for people: one HTML page, and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylo_moe.errors import one_line
from dylo_moe.pages import Page
from dylo_moe.routes.colours import Coloured, coloured, legend, palette_css

LISTED_TASKS = 500
_COLOURS = {"bad": "red", "warning": "yellow", "good": "green", "note": "cyan"}
HOW_TO_READ = (
    ("share", "an expert's part of the weight of a token: |weight| / sum of all |weights|; means are over tokens and layers"),
    ("largest", "part of the tokens whose largest weight is this expert's; equal weights divide the token among them"),
    ("mean weight", "of the weights as they are, which need not add up to 1"),
    ("confidence", "the largest share of a token, averaged"),
    ("entropy", "of a token's shares, divided by the largest possible: 0 is one expert alone, 1 is all alike"),
    ("effective experts", "exp(entropy of the mean shares): how many equally loaded experts would be as diverse"),
    ("coefficient of variation", "of the experts' mean shares: 0 is a perfect balance"),
    (
        "load-balancing loss",
        "mse: mean of (P - 1/E)^2; switch: E sum f P, 1 when balanced; P mean weight, f part where it is largest",
    ),
    ("information of the task", "mutual information of task and expert: 0 where every task has the same mixture, at most log2 E"),
    (
        "variation over tokens",
        "standard deviation of an expert's share between tokens, of the expert and layer where it is largest",
    ),
)


def build_page(document: Mapping[str, Any], figures: Mapping[str, Figure], texts: Sequence[Coloured]) -> Page:
    """figures: those of `draw`, by their names. texts: what to show token by token."""
    experts = document["experts"]
    page = Page(f"Routing of {Path(document['checkpoint']['path']).name}", css=palette_css(len(experts)))
    page.paragraph(headline(document))
    for finding in document["findings"]:
        page.notice(finding["kind"], finding["text"])
    _load(page, document, figures)
    _decisions(page, document, figures)
    _tasks(page, document, figures)
    _places(page, document, figures)
    _tokens(page, document, texts)
    _about(page, document)
    return page


def headline(document: Mapping[str, Any]) -> str:
    router, texts = document["router"], document["texts"]
    layers = len(document["layers"])
    speaks = f"separately in {layers} layers" if layers > 1 else "once for all layers"
    top_k = f", top_k {router['top_k']}" if router["top_k"] is not None else ""
    return (
        f"{len(document['experts'])} experts; router {router['kind']} on features {router['features']}{top_k}, {speaks}. "
        f"{document['tokens']:,} tokens ({document['prompt_tokens']:,} of prompts, {document['completion_tokens']:,} of "
        f"completions) of {texts['texts']:,} texts in {len(document['tasks']):,} tasks, from {texts['source']}."
    )


def expert_rows(document: Mapping[str, Any]) -> list[list[object]]:
    """expert, name, share, largest, mean weight, of prompts, of completions."""
    balance, parts = document["balance"], document["parts"]
    return [
        [
            number,
            name,
            balance["share"][number],
            balance["first"][number],
            balance["mean_weight"][number],
            *(None if parts[part] is None else parts[part][number] for part in ("prompt", "completion")),
        ]
        for number, name in enumerate(document["experts"])
    ]


def _expert_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Headers and rows, without the columns that hold nothing."""
    rows = expert_rows(document)
    filled = [column for column in range(len(EXPERT_HEADERS)) if any(row[column] is not None for row in rows)]
    return [EXPERT_HEADERS[column] for column in filled], [[row[column] for column in filled] for row in rows]


EXPERT_HEADERS = ("expert", "name", "share", "largest", "mean weight", "in prompts", "in completions")


def measure_rows(document: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    balance, before = document["balance"], document["decision_before_top_k"]
    return [
        ("effective experts", balance["effective_experts"]),
        ("coefficient of variation", balance["coefficient_of_variation"]),
        ("load-balancing loss, mse", balance["load_balancing_loss"]["mse"]),
        ("load-balancing loss, switch", balance["load_balancing_loss"]["switch"]),
        ("confidence", document["decision"]["confidence"]["mean"]),
        ("entropy", document["decision"]["entropy"]["mean"]),
        ("confidence before top k", before and before["confidence"]["mean"]),
        ("entropy before top k", before and before["entropy"]["mean"]),
        ("information of the task, bits", document["task_information_bits"]),
        ("largest variation over tokens", document["largest_variation_over_tokens"]),
    ]


def _load(page: Page, document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    page.heading("Load of the experts")
    headers, rows = _expert_table(document)
    page.table(headers, [[_fixed(value) for value in row] for row in rows])
    page.figure(figures["load"], "Mean share of the weight, and how often an expert has the largest weight of a token.")


def _decisions(page: Page, document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    page.heading("How sure the router is")
    page.table(("measure", "value"), [row for row in measure_rows(document) if row[1] is not None])
    page.figure(figures["decisions"], "Distribution over tokens of the largest share (confidence) and of the entropy.")
    if document["router"]["top_k"] == 1:
        page.paragraph(
            "With top_k = 1 every weight is 1 or 0, however sure the router is: only the shares before the choice tell."
        )


def _tasks(page: Page, document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    page.heading("Experts and tasks")
    page.figure(figures["experts_by_task"], "Share of the weight by task; tasks with the same dominant expert stand together.")
    headers = ("task", "dominant expert", "its share", "confidence", "entropy", "texts", "tokens")
    tasks = document["tasks"]
    page.table(headers, [_task_row(task, document["experts"]) for task in tasks[:LISTED_TASKS]], "Task and dominant expert")
    if len(tasks) > LISTED_TASKS:
        page.paragraph(f"{len(tasks) - LISTED_TASKS} more tasks are in routing_analysis.json.")


def _task_row(task: Mapping[str, Any], experts: Sequence[str]) -> list[object]:
    expert = task["dominant"]
    name, share = ("none", None) if expert is None else (f"{expert}: {experts[expert]}", task["share"][expert])
    numbers = [_fixed(value) for value in (share, task["confidence"], task["entropy"], task["texts"], task["tokens"])]
    return [task["task"], name, *numbers]


def _places(page: Page, document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    page.heading("Experts and positions")
    width = document["positions"]["width"]
    each = "" if width == 1 else f" Each column is {width} positions."
    page.figure(figures["experts_by_position"], f"Share of the weight by position in the text.{each}")
    if "experts_by_layer" in figures:
        page.heading("Experts and layers")
        page.figure(figures["experts_by_layer"], "Share of the weight by routed layer.")
        headers = ("layer", "experts", "dominant", "confidence", "entropy", "coefficient of variation", "variation over tokens")
        names = ("layer", "experts", "dominant", "confidence", "entropy", "coefficient_of_variation", "variation_over_tokens")
        page.table(headers, [[_fixed(layer[name]) for name in names] for layer in document["layers"]])


def _tokens(page: Page, document: Mapping[str, Any], texts: Sequence[Coloured]) -> None:
    page.heading("Tokens by expert")
    mean = " The mean over all layers." if len(document["layers"]) > 1 else ""
    page.paragraph(
        f"The colour and the line below a token are those of the expert with the largest share, whose number stands wherever it "
        f"changes; a stronger colour is a larger share, and pointing at a token lists the shares.{mean} "
        f"Tokens without a dominant expert have a thin dotted line. {len(texts)} of {document['texts']['texts']} texts are shown."
    )
    page.markup(legend(document["experts"]))
    for number, text in enumerate(texts):
        opened = Markup(" open") if number < 2 else ""
        summary = Markup("<details{}><summary>{}</summary>{}</details>")
        page.markup(summary.format(opened, text.name, coloured(text, document["experts"])))


def _about(page: Page, document: Mapping[str, Any]) -> None:
    page.heading("What the numbers mean")
    page.table(("word", "meaning"), HOW_TO_READ)
    limits = [(name, found["value"], found["reason"]) for name, found in document["thresholds"].items()]
    page.table(("warning", "threshold", "reason"), limits)
    page.heading("Made with")
    checkpoint, texts = document["checkpoint"], document["texts"]
    rows = [("checkpoint", one_line(checkpoint["path"])), ("format", checkpoint["format"])]
    rows += [(f"SHA-256 of {name}", value) for name, value in checkpoint["sha256"].items() if value]
    rows += [("warning", one_line(line)) for line in checkpoint["warnings"]]
    rows += [("assumed", one_line(f"{name} = {value}")) for name, value in checkpoint["assumptions"].items()]
    rows += [("SHA-256 of texts", texts["sha256"]), *document["versions"].items(), ("made", document["created"])]
    rows += [(name, f"{texts[name]} texts") for name in ("cut", "empty") if texts[name]]
    page.table(("what", "value"), rows)


def print_report(document: Mapping[str, Any], console: Console) -> None:
    """The experts, the measures and the findings as text."""
    console.print(one_line(headline(document)), markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    headers, rows = _expert_table(document)
    for header in headers:
        table.add_column(header, justify="left" if header == "name" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    measures = Table(box=None, pad_edge=False, show_header=False)
    for name, value in measure_rows(document):
        if value is not None:
            measures.add_row(name, _cell(value))
    console.print(measures)
    for line in document["checkpoint"]["warnings"]:
        console.print(f"checkpoint  {one_line(line)}", markup=False, highlight=False)
    for finding in document["findings"]:
        style = _COLOURS[finding["kind"]]
        console.print(f"[{style}]{finding['kind']}[/{style}]  {escape(one_line(finding['text']))}", highlight=False)


def _cell(value: object) -> str:
    return escape(one_line(str(_fixed(value))))


def _fixed(value: object) -> object:
    """Shares below one another with their points in one line."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else value
