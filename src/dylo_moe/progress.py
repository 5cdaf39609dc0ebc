"""How far a generation is, on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Tasks and samples done, tokens per second, time left. Use as a context manager.

    Args:
        label: what is generated.
        samples: for each sample to come, the task it belongs to.
        console: where it is shown; None for stderr.
    """

    def __init__(self, label: str, samples: Iterable[str], console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._label = label
        self._left = Counter(samples)
        self._tasks = len(self._left)
        self._samples = self._left.total()
        self._tokens = 0
        self._begin = self._last_line = time.monotonic()
        self._bars = self._new_bars() if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
            self._bar = self._bars.add_task(escape(self._label), total=self._samples, told=self._told())
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def tick(self, tokens: int) -> None:
        """So many more tokens were written."""
        self._tokens += tokens
        self._show()

    def finish(self, task: str) -> None:
        """One more sample of the task is there."""
        self._left[task] -= 1
        self._left += Counter()  # forgets what is zero
        self._show()

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def _show(self) -> None:
        done = self._samples - self._left.total()
        if self._bars:
            self._bars.update(self._bar, completed=done, told=self._told())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{self._label}: {self._told()}")

    def _told(self) -> str:
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        left = self._left.total()
        done = self._samples - left
        time_left = f", {_clock(elapsed * left / done)} left" if done else ""
        tasks = f"{self._tasks - len(self._left)}/{self._tasks} tasks, {done}/{self._samples} samples"
        speed = f", {self._tokens / elapsed:.0f} tokens/s" if self._tokens else ""
        return f"{tasks}{speed}{time_left}"

    def _new_bars(self) -> Bars:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[told]}")
        return Bars(*columns, console=self.console, refresh_per_second=4)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
