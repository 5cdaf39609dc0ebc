"""The progress of a generation, in a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import dylo_moe.progress
from dylo_moe.progress import Progress


def shown(terminal, steps=(("a", 10), ("b", 20))):
    out = io.StringIO()
    with Progress("humaneval best", ["a", "a", "b"], Console(file=out, force_terminal=terminal, width=150)) as progress:
        for task, tokens in steps:
            progress.tick(tokens)
            progress.finish(task)
    return out.getvalue()


def test_outside_of_a_terminal_short_runs_are_silent():
    assert shown(terminal=False) == ""


def test_outside_of_a_terminal_a_line_comes_now_and_then(monkeypatch):
    monkeypatch.setattr(dylo_moe.progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = shown(terminal=False).splitlines()
    assert "humaneval best: 0/2 tasks, 0/3 samples" in lines[0] and "left" not in lines[0]
    assert "1/2 tasks, 2/3 samples" in lines[-1] and "tokens/s" in lines[-1] and lines[-1].endswith("left")


def test_terminal_shows_a_bar():
    text = shown(terminal=True)
    assert "1/2 tasks, 2/3 samples" in text and "tokens/s" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")])
def test_time_left_is_hours_minutes_seconds(seconds, text):
    assert dylo_moe.progress._clock(seconds) == text
