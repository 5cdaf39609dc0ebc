"""Sums over tokens, from which every number of the analysis is made: weights are added as they come, and not kept.

Shapes: S tokens of one text, L routed layers (1 where all layers share the weights), E experts, T tasks, N places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dylo_moe.routes.measures import entropy_of, firsts_of, shares_of

BINS = 20
PLACES = 48
PARTS = ("prompt", "completion")


class Sums:
    """Shares of experts, added up over tokens and layers, for `groups` groups of them.

    Attributes:
        count: (groups,) how many were added, those without any expert left out.
        share, first: (groups, E) sums of shares, and of who has the largest one.
        confidence, entropy: (groups,) sums of the largest share, and of the entropy as a part of the largest that there can be.
    """

    def __init__(self, groups: int, experts: int) -> None:
        self.count = np.zeros(groups)
        self.share = np.zeros((groups, experts))
        self.first = np.zeros((groups, experts))
        self.confidence = np.zeros(groups)
        self.entropy = np.zeros(groups)

    def add(self, groups: Sequence[int] | np.ndarray | slice, measured: dict[str, np.ndarray]) -> None:
        """Adds what was measured to the groups that are named, row by row; a group may be named several times."""
        for name, values in measured.items():
            np.add.at(getattr(self, name), groups, values)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """A sum of this object divided by the counts; 0 where nothing was added."""
        counts = self.count.reshape(-1, *[1] * (values.ndim - 1))
        return np.divide(values, counts, out=np.zeros_like(values), where=counts > 0)


@dataclass(frozen=True)
class Observation:
    """One text as the router saw it.

    task: the task's number. weights: (S, L, E), float64. prompt_length: how many of the S tokens are the prompt.
    before: the shares before the top k were chosen, (S, L, E), where a router chooses; else None.
    """

    task: int
    weights: np.ndarray
    prompt_length: int
    before: np.ndarray | None = None


class Tally:
    """Everything that is known of the routing so far.

    Args:
        tasks: how many.
        here: for each layer how many experts it has; the entropy of a layer is compared with the largest that it can have.
        num_experts: E.
        longest: tokens of the longest text; the positions are put together into at most PLACES places.
    """

    def __init__(self, tasks: int, here: Sequence[int], num_experts: int, longest: int) -> None:
        self.here = np.array(here)
        self.width = max(1, -(-longest // PLACES))
        self.layers = Sums(len(here), num_experts)
        self.tasks = Sums(tasks, num_experts)
        self.places = Sums(-(-longest // self.width), num_experts)
        self.parts = Sums(len(PARTS), num_experts)
        self.before = Sums(1, num_experts)
        self.weight = np.zeros(num_experts)
        self.square = np.zeros((len(here), num_experts))
        self.texts, self.tokens = np.zeros(tasks, int), np.zeros(tasks, int)
        self.part_tokens = np.zeros(len(PARTS), int)
        self.pairs = self.broken = self.unrouted = 0
        self.histograms = {name: np.zeros(BINS, int) for name in ("confidence", "entropy")}
        self.before_histograms = {name: np.zeros(BINS, int) for name in ("confidence", "entropy")}

    def add(self, seen: Observation) -> None:
        finite = np.isfinite(seen.weights).all(axis=-1)  # (S, L)
        weights = np.where(finite[..., None], seen.weights, 0.0)
        measured = self._measure(shares_of(weights))
        places = np.arange(len(weights))
        is_completion = (places >= seen.prompt_length).astype(int)
        by_token = {name: values.sum(axis=1) for name, values in measured.items()}
        self.layers.add(slice(None), {name: values.sum(axis=0) for name, values in measured.items()})
        self.tasks.add([seen.task], {name: values.sum(axis=0, keepdims=True) for name, values in by_token.items()})
        self.places.add(places // self.width, by_token)
        self.parts.add(is_completion, by_token)
        _count(self.histograms, measured)
        self.weight += weights.sum(axis=(0, 1))
        self.square += (measured["share"] ** 2).sum(axis=0)
        self.texts[seen.task] += 1
        self.tokens[seen.task] += len(places)
        self.part_tokens += np.bincount(is_completion, minlength=len(PARTS))
        self.pairs += int(finite.sum())
        self.broken += int((~finite).sum())
        self.unrouted += int(finite.sum() - measured["count"].sum())
        if seen.before is not None:
            measured = self._measure(np.where(np.isfinite(seen.before).all(axis=-1, keepdims=True), seen.before, 0.0))
            self.before.add([0], {name: values.sum(axis=(0, 1))[None] for name, values in measured.items()})
            _count(self.before_histograms, measured)

    def _measure(self, shares: np.ndarray) -> dict[str, np.ndarray]:
        """What `Sums` adds up, of shares (S, L, E); all of it is 0 where no expert has a share."""
        routed = shares.any(axis=-1)
        most = np.log(np.maximum(self.here, 2))[None, :]  # one expert alone has entropy 0, whatever it is divided by
        return {
            "count": routed.astype(float),
            "share": shares,
            "first": firsts_of(shares),
            "confidence": shares.max(axis=-1),
            "entropy": np.minimum(entropy_of(shares) / most, 1.0),
        }

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation of each expert's share over the tokens of each layer, (L, E): 0 for a router that is constant."""
        mean = self.layers.mean(self.layers.share)
        return np.sqrt(np.maximum(self.layers.mean(self.square) - mean**2, 0.0))


def _count(histograms: dict[str, np.ndarray], measured: dict[str, np.ndarray]) -> None:
    routed = measured["count"] > 0
    for name, counts in histograms.items():
        counts += np.histogram(measured[name][routed], bins=BINS, range=(0.0, 1.0))[0]
