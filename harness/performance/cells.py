"""One cell of the goal table: what is compared with what, how much of it is unavoidable, and how much is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from harness.measure import PairedTimer, Work

FEWEST_PAIRS = 9


@dataclass(frozen=True)
class Cell:
    """The ratio of `ours` to `other`, or of two counts.

    Attributes:
        group: cells of one goal.
        name: unique in its group.
        goal: the ratio has to be at most this, or at least this.
        at_least: which of the two.
        limit: the ratio that the shapes demand, from counted operations or bytes; None where there is none.
        ours, other: what is timed, in pairs.
        count: in place of the two, a ratio of counted bytes or operations, which needs one measurement only.
        tags: shape and settings, for the pictures.
        note: what else was found, in a few words.
    """

    group: str
    name: str
    goal: float
    limit: float | None = None
    at_least: bool = False
    ours: Work | None = None
    other: Work | None = None
    count: Callable[[], float] | None = None
    tags: dict[str, object] = field(default_factory=dict)
    note: str = ""

    def measured(self, *, pairs: int, threads: int, device: str = "cpu", seed: int = 0) -> Result:
        if self.count is not None:
            ratio = self.count()
            return Result(self, ratio, ratio, ratio, [])
        timer = PairedTimer(self.ours, self.other, device=device, seed=seed, threads=threads)
        found = timer.more(max(pairs, FEWEST_PAIRS))
        return Result(self, found.ratio, found.low, found.high, timer.times)


@dataclass(frozen=True)
class Result:
    """ratio: the median over pairs; low, high: its 95 % bootstrap bounds; times: seconds of ours and of the other, per pair."""

    cell: Cell
    ratio: float
    low: float
    high: float
    times: list[tuple[float, float]]

    @property
    def reached(self) -> bool:
        """By the median; `sure` says whether the interval agrees."""
        return self.ratio >= self.cell.goal if self.cell.at_least else self.ratio <= self.cell.goal

    @property
    def sure(self) -> bool:
        worst, best = (self.low, self.high) if self.cell.at_least else (self.high, self.low)
        met = [value >= self.cell.goal if self.cell.at_least else value <= self.cell.goal for value in (worst, best)]
        return met[0] == met[1]
