"""What the terminal shows while the judge works: a line and a bar per checkpoint, plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness import outcome
from harness.verdict import one_line

COLOURS = {
    outcome.PASS: "green",
    outcome.FAIL: "bold red",
    outcome.NOT_APPLICABLE: "dim",
    outcome.VOID: "yellow",
    outcome.INCONCLUSIVE: "yellow",
    outcome.ERROR: "bold magenta",
}


class Display:
    """`start` a checkpoint, `result` for each check, `finish` it; use as a context manager."""

    def __init__(self, *, verbose: bool = False) -> None:
        # The real stdout, held now: pytest replaces sys.stdout while a check runs.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._verbose = verbose
        self._progress = self._bars() if self.console.is_terminal else None
        self._task: TaskID | None = None
        self._counts: Counter[str] = Counter()
        self._name = ""
        self._started = 0.0

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(escape(text), style=style)

    def start(self, name: str, total: int) -> None:
        self._name, self._counts, self._started = name, Counter(), time.perf_counter()
        if self._verbose:
            self.console.print(f"{escape(name)}:")
        if self._progress:
            self._task = self._progress.add_task(escape(name), total=total, counts="")

    def result(self, result: dict) -> None:
        self._counts[result["outcome"]] += 1
        if self._progress and self._task is not None:
            self._progress.update(self._task, advance=1, counts=self._told())
        if self._verbose:
            colour = COLOURS[result["outcome"]]
            message = f"  {escape(one_line(result['message']))}" if result["message"] else ""
            self.console.print(f"  [{colour}]{result['outcome']:<14}[/] {result['id']} {result['seconds']:.2f} s{message}")

    def finish(self) -> None:
        if not self._progress:
            self.console.print(f"{escape(self._name)}: {self._told()}, {time.perf_counter() - self._started:.1f} s")

    def _told(self) -> str:
        counts = [f"[{COLOURS[kind]}]{self._counts[kind]} {kind}[/]" for kind in outcome.OUTCOMES if self._counts[kind]]
        return ", ".join(counts)

    def _bars(self) -> Progress:
        name, tally = TextColumn("{task.description}"), TextColumn("{task.fields[counts]}")
        return Progress(name, BarColumn(bar_width=20), MofNCompleteColumn(), tally, TimeElapsedColumn(), console=self.console)
