"""How sure a score is: intervals over tasks, and two runs compared task by task.

The tasks are taken as a sample of the tasks that one could have asked; so they are what intervals and tests count, not the
samples of a task, which depend on each other.

Intervals add a few made-up tasks, half of them at each end of the scale, before the normal approximation (Agresti and Coull;
Bonett and Price). A bootstrap over the tasks was not chosen: where all tasks pass, or all fail, its interval has no width
however few they are, and with one sample per task it is the Wald interval, which covers too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import ndtri  # the normal distribution's quantile

CONFIDENCE = 0.95
POWER = 0.80
RESAMPLES = 9_999  # of the permutation test where the tasks are too many to try every combination
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; low <= value <= high."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Second run against first, over the same tasks.

    difference: mean of (second - first). won, lost: positions of the tasks where the second is better, worse.
    p: two-sided, of "on each task either is as likely to be the better one". detectable: the true difference that a run with
    as many tasks finds with a probability of 80 %.
    """

    difference: Estimate
    won: list[int]
    lost: list[int]
    p: float
    detectable: float


def pass_at_k(samples: Sequence[int], correct: Sequence[int], k: int) -> np.ndarray:
    """The chance that of k samples of a task at least one is right, (tasks,): 1 - C(n - c, k) / C(n, k), unbiased.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Args:
        samples, correct: n and c of each task.

    Raises:
        ValueError: k is not between 1 and every n, or a c not between 0 and its n.
    """
    n, c = np.asarray(samples, dtype=int), np.asarray(correct, dtype=int)
    if n.shape != c.shape or not n.size or k < 1 or (n < k).any() or (c < 0).any() or (c > n).any():
        raise ValueError(f"pass@{k} of {n.tolist()} samples with {c.tolist()} right")
    i = np.arange(k)  # C(n-c, k) / C(n, k) as a product of k factors, which neither overflows nor cancels
    factors = (n - c)[:, None] - i
    return 1.0 - (np.maximum(factors, 0) / (n[:, None] - i)).prod(axis=1)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of the tasks' values, each in [0, 1], with the interval of Agresti and Coull.

    z^2 tasks are added, half with value 0, half with value 1; then mean and variance as usual. For values that are 0 or 1
    this is the published interval; for rates between, the tasks' own variance takes the place of p (1 - p). It never excludes
    the plain mean.

    Source: Agresti and Coull 1998, "Approximate is better than 'exact' for interval estimation of binomial proportions".
    """
    v = _within(values, 0.0, 1.0)
    z = ndtri((1 + confidence) / 2)
    size = len(v) + z**2
    centre = (v.sum() + z**2 / 2) / size
    variance = ((v**2).sum() + z**2 / 2) / size - centre**2
    half = z * np.sqrt(max(variance, 0.0) / size)
    return Estimate(float(v.mean()), float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def compare(first: Sequence[float], second: Sequence[float], *, tests: int = 1) -> Paired:
    """Two runs over the same tasks, values in [0, 1]: 0 or 1 with one sample per task, else the share of right samples.

    tests: how many comparisons are made together; it raises `detectable` as Bonferroni's correction does, and not p (see `holm`).

    Raises:
        ValueError: no tasks, or not the same number.
    """
    a, b = _within(first, 0.0, 1.0), _within(second, 0.0, 1.0)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} tasks against {len(b)}")
    difference = b - a
    estimate, error = _difference_interval(difference)
    return Paired(
        difference=estimate,
        won=np.flatnonzero(difference > 0).tolist(),
        lost=np.flatnonzero(difference < 0).tolist(),
        p=paired_p(difference),
        detectable=float((ndtri(1 - (1 - CONFIDENCE) / 2 / tests) + ndtri(POWER)) * error),
    )


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences: McNemar's exact test where all are -1, 0 or 1, else the sign-flip permutation test.

    McNemar's: of the tasks that only one run solved, each is as likely the one's as the other's (binomial with 1/2). The other
    flips the signs of the differences: all combinations up to 13 tasks that differ, else 9,999 random ones with a fixed seed.

    Sources: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages";
    Fisher 1935, "The Design of Experiments", section 21.
    """
    d = _within(differences, -1.0, 1.0)
    d = d[d != 0]
    if len(d) < 2:  # one task that differs says nothing: either sign is as likely
        return 1.0
    if (np.abs(d) == 1).all():
        return float(stats.binomtest(int((d > 0).sum()), len(d)).pvalue)
    found = stats.permutation_test(
        (d, np.zeros_like(d)),
        _total,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=1_000,
        rng=np.random.default_rng(SEED),
    )
    return float(min(1.0, found.pvalue))


def fewest_tasks(tests: int = 1) -> int:
    """With fewer tasks no outcome of so many comparisons is significant: even if one run wins all n, p is 2 / 2^n."""
    return math.floor(math.log2(2 * tests / (1 - CONFIDENCE))) + 1


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, each raised so that one false alarm among all of them is as rare as p says.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return adjusted.tolist()


def _difference_interval(d: np.ndarray) -> tuple[Estimate, float]:
    """Mean of paired differences, with the interval of Bonett and Price, and its standard error.

    Two tasks are added, one that the second run wins, one that the first wins. For differences of -1, 0 and 1 this is the
    published interval.

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data"; recommended by Fagerland, Lydersen and Laake 2014.
    """
    size = len(d) + 2
    centre = d.sum() / size
    error = float(np.sqrt(max(((d**2).sum() + 2) / size - centre**2, 0.0) / size))
    half = ndtri((1 + CONFIDENCE) / 2) * error
    return Estimate(float(d.mean()), float(max(-1.0, centre - half)), float(min(1.0, centre + half))), error


def _total(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    """Rounded, so that totals that are equal count as equal: 0.1 + 0.2 - 0.3 is not 0."""
    return (first - second).sum(axis=axis).round(9)


def _within(values: Sequence[float], low: float, high: float) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not found.size or not ((found >= low) & (found <= high)).all():
        raise ValueError(f"values {found.tolist()}, but should be at least one number, each in [{low:g}, {high:g}]")
    return found
