"""How long work tells where it is: a function around what it goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def silently(items: Sequence[Any], what: str) -> Iterator[Any]:
    """Says nothing, for use from Python."""
    yield from items


def on_stderr(items: Sequence[Any], what: str) -> Iterator[Any]:
    """A bar with the number done and the time left; stdout stays for results."""
    yield from track(items, description=what, console=Console(stderr=True))
