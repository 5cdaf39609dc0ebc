"""Statistics against published numbers, scipy, exact enumeration, and simulated coverage."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from evalplus.eval import estimate_pass_at_k
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dylo_moe.statistics import compare, fewest_tasks, holm, mean_interval, paired_p, pass_at_k

RATES = st.lists(st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=1, max_size=30)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (10, 3, 1), (10, 3, 5), (10, 3, 10), (200, 7, 100), (5, 5, 3)])
def test_pass_at_k_is_the_exact_fraction_and_that_of_evalplus(n, c, k):
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))
    assert pass_at_k([n], [c], k)[0] == pytest.approx(float(exact), abs=1e-12)
    assert pass_at_k([n], [c], k)[0] == pytest.approx(estimate_pass_at_k([n], [c], k)[0], abs=1e-12)


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    """All the ways to draw 3 of 6 samples, 2 of which are right."""
    right = [True, True, False, False, False, False]
    draws = [d for d in product(range(6), repeat=3) if len(set(d)) == 3]
    share = np.mean([any(right[i] for i in draw) for draw in draws])
    assert pass_at_k([6], [2], 3)[0] == pytest.approx(share)


@pytest.mark.parametrize(("n", "c", "k"), [([2], [1], 3), ([2], [3], 1), ([2, 2], [1], 1), ([], [], 1), ([2], [1], 0)])
def test_pass_at_k_refuses_what_has_no_answer(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_interval_of_single_samples_is_the_published_one():
    """Agresti and Coull by hand: 8 of 10; centre (8 + 1.9207) / 13.8415."""
    found = mean_interval([1.0] * 8 + [0.0] * 2)
    centre = (8 + 1.920729) / 13.841459
    half = 1.959964 * (centre * (1 - centre) / 13.841459) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize("n", [5, 20, 164])
def test_interval_of_single_samples_holds_wilsons_around_the_same_centre(n):
    for c in range(n + 1):
        ours, wilson = mean_interval([1.0] * c + [0.0] * (n - c)), stats.binomtest(c, n).proportion_ci(method="wilson")
        assert ours.low <= wilson.low + 1e-12 and wilson.high <= ours.high + 1e-12
        if ours.low > 0 and ours.high < 1:
            assert ours.low + ours.high == pytest.approx(wilson.low + wilson.high)


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.80, 1.0), (0.0, 0.0, 0.20)])
def test_all_pass_and_all_fail_of_twenty_tasks_leave_room(share, low, high):
    found = mean_interval([share] * 20)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


@settings(deadline=None)
@given(RATES)
def test_interval_holds_the_mean_and_stays_within_the_scale(values):
    found = mean_interval(values)
    assert 0 <= found.low <= found.value <= found.high <= 1


@settings(deadline=None, max_examples=40)
@given(RATES, st.randoms())
def test_difference_holds_the_mean_and_turns_round_with_the_runs(values, random):
    other = random.sample(values, len(values))
    there, back = compare(values, other), compare(other, values)
    assert -1 <= there.difference.low <= there.difference.value <= there.difference.high <= 1
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert (there.won, there.lost, there.p) == (back.lost, back.won, pytest.approx(back.p))


def coverage(draw, interval, true, runs=500):
    """How often the interval of a drawn run holds the true value."""
    rng = np.random.default_rng(0)
    found = [interval(draw(rng)) for _ in range(runs)]
    return np.mean([one.low <= true <= one.high for one in found])


@pytest.mark.parametrize("tasks", [6, 18, 164])
def test_interval_covers_the_truth_with_one_sample_per_task(tasks):
    """Exact: every count of right samples with its probability. (Wald's covers 2 % of tasks among 18 with 0.30.)"""
    counts = np.arange(tasks + 1)
    intervals = [mean_interval([1.0] * c + [0.0] * (tasks - c)) for c in counts]
    shares = np.linspace(0.01, 0.99, 99)
    covered = np.array([[one.low <= share <= one.high for one in intervals] for share in shares])
    found = (covered * stats.binom.pmf(counts, tasks, shares[:, None])).sum(axis=1)
    assert found.min() > 0.90 and found.mean() > 0.95


@pytest.mark.parametrize("tasks", [10, 164])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.2, 2.0), (5.0, 0.1), (5.0, 5.0)])
def test_interval_covers_the_truth_with_ten_samples_per_task(tasks, a, b):
    """Tasks of different difficulty: each has its own chance, from a beta distribution."""
    found = coverage(lambda rng: rng.binomial(10, rng.beta(a, b, tasks)) / 10, mean_interval, a / (a + b))
    assert found >= 0.92


def test_more_samples_per_task_give_a_narrower_interval():
    rng = np.random.default_rng(0)
    chances = rng.beta(2, 2, 164)
    one, ten = (mean_interval(rng.binomial(n, chances) / n) for n in (1, 10))
    assert ten.high - ten.low < 0.7 * (one.high - one.low)


@pytest.mark.parametrize("tasks", [10, 164])
@pytest.mark.parametrize(("both", "first", "second"), [(0.3, 0.05, 0.15), (0.0, 0.0, 0.3), (0.9, 0.02, 0.02)])
def test_difference_covers_the_truth(tasks, both, first, second):
    """Correlated runs: a task is solved by both, by one, or by none."""

    def draw(rng):
        kind = rng.choice(4, size=tasks, p=[both, first, second, 1 - both - first - second])
        return (kind < 2).astype(float), np.isin(kind, (0, 2)).astype(float)

    assert coverage(draw, lambda runs: compare(*runs).difference, second - first) >= 0.92


def test_difference_of_single_samples_is_the_published_one():
    """Bonett and Price by hand: 30 tasks, 8 won, 3 lost: (9 - 4) / 32 with variance 13/32 - (5/32)^2."""
    first, second = [0.0] * 8 + [1.0] * 3 + [1.0] * 19, [1.0] * 8 + [0.0] * 3 + [1.0] * 19
    found = compare(first, second).difference
    half = 1.959964 * ((13 / 32 - (5 / 32) ** 2) / 32) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((5 / 30, 5 / 32 - half, 5 / 32 + half), abs=1e-6)


def test_p_of_single_samples_is_mcnemars_exact_one():
    """10 won, 2 lost: twice the binomial tail, 2 * (1 + 12 + 66) / 4096."""
    found = compare([0.0] * 10 + [1.0] * 2 + [1.0] * 30, [1.0] * 10 + [0.0] * 2 + [1.0] * 30)
    assert (len(found.won), len(found.lost)) == (10, 2)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_pairs_decide_and_not_the_sums():
    """The same two sums, 20 and 26 of 40: six tasks more, or noise among forty."""
    nested = compare([1.0] * 20 + [0.0] * 20, [1.0] * 26 + [0.0] * 14)
    crossed = compare([1.0] * 20 + [0.0] * 20, [0.0] * 14 + [1.0] * 26)
    assert nested.p == pytest.approx(2 / 64) and crossed.p > 0.3
    assert nested.difference.low > 0 > crossed.difference.low
    assert nested.detectable < crossed.detectable


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_p_of_rates_is_that_of_all_sign_flips(thirds):
    d = np.array(thirds) / 3
    if len(set(np.abs(d[d != 0]).round(9)) - {1.0}) == 0:
        d = np.append(d, 1 / 3)  # not McNemar's case
    sums = np.array([(d * signs).sum() for signs in product((1, -1), repeat=len(d))])
    tail = min((sums >= d.sum() - 1e-9).mean(), (sums <= d.sum() + 1e-9).mean())
    assert paired_p(d) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("tenths", [[1, 2, -3], [-6, -6, 4, -5, -3, 8, 8], [-7, -1, -1, -1, 2, 8]])
def test_runs_that_balance_do_not_differ_whatever_floats_make_of_their_sum(tenths):
    assert paired_p([tenth / 10 for tenth in tenths]) == 1.0


def test_p_of_many_rates_is_repeatable_and_near_the_t_test():
    rng = np.random.default_rng(1)
    first = rng.binomial(10, rng.beta(2, 2, 164)) / 10
    second = np.clip(first + rng.normal(0.03, 0.15, 164).round(1), 0, 1)
    p = compare(first, second).p
    assert p == compare(first, second).p
    assert p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)


def test_false_alarms_are_as_rare_as_p_says():
    rng = np.random.default_rng(0)
    found = [compare(*(rng.random((2, 60)) < 0.4).astype(float)).p for _ in range(400)]
    assert 0.005 < np.mean(np.array(found) < 0.05) <= 0.06


def test_equal_runs_do_not_differ():
    found = compare([1.0, 0.0, 0.5], [1.0, 0.0, 0.5])
    assert (found.p, found.won, found.lost, found.difference.value) == (1.0, [], [], 0.0)


@pytest.mark.parametrize("tests", [1, 3, 6, 45])
def test_with_fewer_than_the_fewest_tasks_even_winning_all_is_not_significant(tests):
    fewest = fewest_tasks(tests)
    one_less, enough = (compare([0.0] * n, [1.0] * n).p for n in (fewest - 1, fewest))
    assert min(holm([one_less] + [1.0] * (tests - 1))) >= 0.05 > min(holm([enough] + [1.0] * (tests - 1)))


def test_more_comparisons_detect_less():
    runs = [1.0, 0.0] * 20, [0.0, 0.0] * 20
    assert compare(*runs, tests=6).detectable > compare(*runs).detectable
    assert compare(*runs, tests=6).p == compare(*runs).p


def test_detectable_difference_is_found_four_times_of_five():
    """Runs that differ by just what is called detectable: the share of intervals that exclude 0."""
    rng = np.random.default_rng(0)
    tasks, changed = 164, 0.2

    def run(difference):
        kind = rng.choice(3, size=tasks, p=[(changed + difference) / 2, (changed - difference) / 2, 1 - changed])
        return compare((kind == 1).astype(float), (kind == 0).astype(float))

    difference = np.mean([run(0.0).detectable for _ in range(50)])
    share = np.mean([run(difference).difference.low > 0 for _ in range(300)])
    assert 0.72 < share < 0.88


def test_holm_raises_as_in_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("values", [[], [1.5], [-0.1], [float("nan")], [[0.5]]])
def test_values_outside_the_scale_are_refused(values):
    with pytest.raises(ValueError, match="should be at least one number"):
        mean_interval(values)


def test_runs_over_other_tasks_are_refused():
    with pytest.raises(ValueError, match="2 tasks against 1"):
        compare([0.0, 1.0], [1.0])
