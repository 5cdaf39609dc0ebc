"""The clock, the counter of work and the counter of bytes, each shown equal work, a fault, and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.compare import Mismatch
from harness.measure import PairedTimer, assert_ratio_at_most, counted_flops, one_thread, peak_bytes, ratio_of, retained_bytes
from harness.outcome import Inconclusive


class ScriptedTimer:
    """Gives pairs from a list in place of measuring: the seam is `more`."""

    def __init__(self, times):
        self._times, self._used = times, 0

    def more(self, pairs):
        self._used += pairs
        return ratio_of(self._times[: self._used], np.random.default_rng(0))


def noisy(ratio, spread, count=64):
    rng = np.random.default_rng(1)
    return [(ratio * float(rng.lognormal(0, spread)), float(rng.lognormal(0, spread))) for _ in range(count)]


MATRIX = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))


def products(count):
    def work():
        for _ in range(count):
            MATRIX @ MATRIX

    return work


def test_work_against_itself_is_about_one():
    found = PairedTimer(products(5), products(5)).more(15)
    assert found.low < 1.25
    assert found.high > 0.8
    assert found.pairs == 15


def test_three_times_the_work_is_over_a_limit_of_two():
    with pytest.raises(Mismatch, match="allowed 2"):
        assert_ratio_at_most(ScriptedTimer(noisy(3.0, 0.05)), 2.0, what="time")


def test_real_clock_finds_four_times_the_work():
    with pytest.raises(Mismatch):
        assert_ratio_at_most(PairedTimer(products(32), products(8)), 1.5, what="time")


def test_ratio_under_its_limit_passes():
    assert assert_ratio_at_most(ScriptedTimer(noisy(1.0, 0.05)), 1.5, what="time").pairs == 7


def test_noise_escalates_and_ends_inconclusive():
    # pairs alternate 0.5 and 2.5 times while one lucky minimum of B keeps the screen from passing
    times = [(0.5, 1.0), (2.5, 1.0)] * 40
    times[0] = (0.5, 0.2)
    with pytest.raises(Inconclusive, match="56 pairs"):
        assert_ratio_at_most(ScriptedTimer(times), 1.2, what="time")


def test_detectable_effect_shrinks_with_pairs():
    few, many = (ScriptedTimer(noisy(1.0, 0.1)).more(pairs).detectable for pairs in (7, 56))
    assert 0 < many < few


def test_one_thread_restores_the_number_of_threads():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_counted_flops_of_a_product():
    assert counted_flops(products(3)) == 3 * 2 * 256**3  # 2 n^3 each


def test_counted_flops_of_a_product_in_place():
    into = torch.zeros(8, 16)
    assert counted_flops(lambda: into.addmm_(torch.ones(8, 4), torch.ones(4, 16))) == 2 * 8 * 4 * 16


def test_peak_counts_what_is_live_at_once():
    def work():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 4000 more
        del first
        return second[:500] * 2  # a view costs nothing, its product 2000; 6000 live

    assert peak_bytes(work) == 8000


def test_peak_does_not_count_what_was_there_before():
    assert peak_bytes(lambda: MATRIX.t()) == 0
    assert peak_bytes(lambda: MATRIX.add_(0.0)) == 0


def test_leak_shows_as_growth_and_its_absence_as_none():
    kept = []
    grown = retained_bytes(lambda: kept.append(torch.zeros(100)))
    assert [later - earlier for earlier, later in zip(grown, grown[1:], strict=False)] == [400, 400]
    assert retained_bytes(lambda: torch.zeros(100)) == [0, 0, 0]


def test_state_that_is_replaced_is_no_leak():
    state = {}

    def work():
        state["last"] = torch.zeros(100)

    retained = retained_bytes(work)
    assert retained[1] == retained[2]
