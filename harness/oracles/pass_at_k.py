"""pass@k exactly, with integers (Chen et al. 2021, arXiv 2107.03374, equation 1)."""

from __future__ import annotations

from fractions import Fraction
from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> Fraction:
    """1 - C(n - c, k) / C(n, k): the chance that k samples drawn without replacement hold at least one correct one.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in 1..{num_samples}, got {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be in 0..{num_samples}, got {num_correct}")
    return 1 - Fraction(comb(num_samples - num_correct, k), comb(num_samples, k))


def mean_pass_at_k(results: list[tuple[int, int]], k: int) -> Fraction:
    """Mean over tasks of (num_samples, num_correct)."""
    return sum((pass_at_k(n, c, k) for n, c in results), Fraction(0)) / len(results)
