"""Each comparison is shown the fault that it exists for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness import compare
from harness.compare import Mismatch, assert_bitwise, assert_same_tokens, assert_within, dot_bound, twice_the_loop
from harness.outcome import Void

WANT = torch.linspace(1.0, 2.0, 6).reshape(2, 3)


def test_equal_values_pass_at_factor_zero():
    assert assert_within(WANT, WANT, 0.0).factor == 0.0


def test_swapped_elements_fail_and_the_worst_is_named():
    got = WANT[:, [0, 2, 1]]
    with pytest.raises(Mismatch) as raised:
        assert_within(got, WANT, 0.1, what="logits")
    # rows 1, 1.2, 1.4 and 1.6, 1.8, 2: every swap is off by 0.2, twice the bound
    assert raised.value.comparison.factor == pytest.approx(2.0)
    assert str(raised.value).startswith("logits at [")
    assert "it would pass at 2 times the bound" in str(raised.value)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["got", "want", "both"])
def test_not_finite_anywhere_fails(poison, side):
    bad = WANT.clone()
    bad[1, 1] = poison
    got, want = (bad if side in (name, "both") else WANT for name in ("got", "want"))
    with pytest.raises(Mismatch):
        assert_within(got, want, 1e9)


def test_nan_bound_fails():
    with pytest.raises(Mismatch):
        assert_within(WANT + 1, WANT, math.nan)


def test_other_shape_fails_even_where_it_broadcasts():
    with pytest.raises(Mismatch, match="got shape"):
        assert_within(WANT[:1], WANT, 1.0)


def test_nothing_to_compare_is_void():
    with pytest.raises(Void):
        assert_within(torch.zeros(0), torch.zeros(0), 1.0)


@pytest.mark.parametrize(("effect", "is_void"), [(99.0, True), (100.0, False), (math.nan, True)])
def test_void_exactly_below_hundred_tolerances(effect, is_void):
    if is_void:
        with pytest.raises(Void, match="a wrong expert would pass"):
            assert_within(WANT, WANT, 1.0, effect=effect)
    else:
        assert_within(WANT, WANT, 1.0, effect=effect)


def test_fault_is_a_failure_even_where_a_pass_would_be_void():
    with pytest.raises(Mismatch):
        assert_within(WANT + 2, WANT, 1.0, effect=0.0)


def test_bound_per_element_is_applied_per_element():
    bound = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.01]])
    got = WANT.clone()
    got[0, 0] += 0.2
    assert_within(got, WANT, bound)
    got[1, 2] += 0.2
    with pytest.raises(Mismatch, match=r"at \[1, 2\]"):
        assert_within(got, WANT, bound)


def test_bitwise_refuses_one_bit_and_another_dtype():
    got = WANT.clone()
    got[0, 0] = torch.nextafter(got[0, 0], torch.tensor(2.0))
    with pytest.raises(Mismatch):
        assert_bitwise(got, WANT)
    with pytest.raises(Mismatch, match="float64"):
        assert_bitwise(WANT.double(), WANT)


def test_bitwise_takes_the_two_zeros_for_equal():
    assert_bitwise(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_recording_keeps_passes_and_the_worst_factor():
    with compare.recording() as comparisons:
        assert_within(WANT + 0.1, WANT, 1.0)
        assert_within(WANT, WANT, 1.0)
    summary = compare.summary(comparisons)
    assert summary["comparisons"] == 2
    assert summary["required_tolerance"] == pytest.approx(0.1, rel=1e-5)
    assert compare.summary([]) == {}


def test_nothing_is_recorded_outside_the_block():
    with compare.recording() as comparisons:
        pass
    assert_within(WANT, WANT, 1.0)
    assert comparisons == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_bound_holds_for_correct_sums_and_refuses_a_dropped_term(dtype):
    terms = 64
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((200, terms))).to(dtype) for _ in range(2))
    exact = (a.double() * b.double()).sum(1)
    bound = dot_bound(terms, dtype, (a.double() * b.double()).abs().sum(1))
    naive = torch.zeros(200, dtype=dtype)
    for term in range(terms):
        naive = naive + a[:, term] * b[:, term]
    assert_within(naive, exact, bound)
    if dtype is torch.float32:
        dropped = (a[:, 1:].double() * b[:, 1:].double()).sum(1)
        with pytest.raises(Mismatch):
            assert_within(dropped, exact, bound)


def test_dot_bound_refuses_sums_longer_than_the_type_can_bound():
    with pytest.raises(ValueError, match="no error bound"):
        dot_bound(256, torch.bfloat16, 1.0)


def test_dot_bound_is_not_zero_where_products_underflow():
    assert dot_bound(3, torch.float32, 0.0) > 0


def test_twice_the_loop_is_twice_its_error_above_the_floor():
    exact = np.array([1.0, -4.0])
    loop = exact + np.array([0.5, 0.25])
    # floor: two roundings of 4 in float32, 2 * 2**-24 * 4
    assert twice_the_loop(loop, exact, torch.float32) == pytest.approx(1.0 + 8 * 2.0**-24)
    assert twice_the_loop(exact, exact, torch.float32) == pytest.approx(8 * 2.0**-24)


def test_twice_the_loop_refuses_a_loop_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        twice_the_loop([math.inf], [1.0], torch.float32)


LOGITS = np.array([[0.0, 1.0, 3.0], [2.0, 1.999, 0.0], [5.0, 0.0, 0.0]])


def test_tokens_equal_return_none():
    assert assert_same_tokens([2, 0, 0], torch.tensor([2, 0, 0])) is None


def test_tokens_shorter_fail():
    with pytest.raises(Mismatch, match="got 2 tokens, wanted 3"):
        assert_same_tokens([2, 0], [2, 0, 0])


def test_tokens_that_part_at_a_near_tie_pass_and_the_step_is_told():
    assert assert_same_tokens([2, 1, 2], [2, 0, 0], got_logits=LOGITS, want_logits=LOGITS, margin=0.002) == 1


@pytest.mark.parametrize("which", ["got_logits", "want_logits"])
def test_tokens_that_part_fail_unless_both_runs_hold_a_near_tie(which):
    clear = LOGITS.copy()
    clear[1, 1] = 0.5
    logits = {"got_logits": LOGITS, "want_logits": LOGITS, which: clear}
    with pytest.raises(Mismatch, match="first difference at step 1, got token 1, wanted 0"):
        assert_same_tokens([2, 1, 2], [2, 0, 0], margin=0.002, **logits)


def test_tokens_that_part_fail_without_logits():
    with pytest.raises(Mismatch):
        assert_same_tokens([2, 1], [2, 0])


def test_tokens_with_nan_logits_fail():
    with pytest.raises(Mismatch):
        assert_same_tokens([2, 1, 2], [2, 0, 0], got_logits=LOGITS * math.nan, want_logits=LOGITS, margin=1.0)
