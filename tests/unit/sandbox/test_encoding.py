"""Values survive the way out of the sandbox with their types; bytes from anywhere give a value or one error."""

from __future__ import annotations

import enum
import math
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylo_moe.sandbox.decoding import Damaged, Opaque, decode
from dylo_moe.sandbox.encoding import MAX_DEPTH, NotEncoded, encode, encode_and_ask

Pair = namedtuple("Pair", "a b")
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
    | st.binary() | st.fractions() | st.integers(-(2**300), 2**300)
)  # fmt: skip
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.lists(inner).map(deque)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
    ),
    max_leaves=25,
)


class Listed(list):
    def __len__(self):
        return 0

    def __iter__(self):
        return iter("lies")


class Equal(list):
    def __eq__(self, other):
        return True


class Colour(enum.IntEnum):
    RED = 1


def same(a, b):
    return type(a) is type(b) and bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)


def typed(value):
    """The value with the types of everything in it, which `==` does not see: 1 == 1.0 == True."""
    if isinstance(value, dict):
        return type(value), [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, list | tuple | deque):
        return type(value), [typed(v) for v in value]
    return type(value), sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_value_comes_back_with_its_types(value):
    assert typed(decode(encode(value))) == typed(value)


@pytest.mark.parametrize(
    "value",
    [
        *(-(2**63), 2**63, -(2**64), math.inf, -0.0, "\ud800", "\ud800\udc00", range(3, 9, 2), Decimal("-1.50"), Fraction(1, 3)),
        *(Counter("aab"), [Counter(), OrderedDict()], ["a"] * 100, [[], [[]], [1, "x", None]], [True, 1, 1.0], [{}, {1: [2]}]),
        *(np.float64(2), np.int8(3), np.arange(6).reshape(2, 3), np.array("abc"), np.zeros((0, 2)), np.complex64(1j)),
    ],
    ids=repr,
)
def test_special_value_comes_back(value):
    back = decode(encode([value]))[0]
    assert same(back, value) and typed(back) == typed(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Listed([1, 2]), [1, 2]),
        (Pair(1, 2), (1, 2)),
        (defaultdict(int, {1: 2}), {1: 2}),
        (Colour.RED, 1),
        (bytearray(b"x"), b"x"),
        ({1: 2}.keys(), {1}),
        ({1: 2}.items(), {(1, 2)}),
    ],
    ids=repr,
)
def test_what_equals_its_base_becomes_its_base(value, plain):
    assert typed(decode(encode(value))) == typed(plain)


@pytest.mark.parametrize(
    "value",
    [
        Equal(),
        object(),
        print,
        iter([]),
        re.match("a", "a"),
        np.array([None]),
        Decimal("1e9999"),
        type("E", (), {"__eq__": any})(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_equals_nothing(value):
    back = decode(encode([value, 1]))
    assert back[1] == 1 and isinstance(back[0], Opaque)
    assert back[0] != value and back[0] != back[0] and decode(encode(value)) is not None


def test_nan_is_no_reason_to_trust_equal_bytes():
    assert encode_and_ask([1.5, "a"])[1]
    assert not any(encode_and_ask(value)[1] for value in (math.nan, [1, [math.nan]], complex(math.nan, 0), print, np.ones(2)))


def nested(levels):
    return [nested(levels - 1)] if levels else []


def test_depth_and_size_are_limited():
    assert decode(encode(nested(MAX_DEPTH - 1))) == nested(MAX_DEPTH - 1)
    itself = []
    itself.append(itself)
    for value in (nested(2 * MAX_DEPTH), itself):
        with pytest.raises(NotEncoded, match="levels"):
            encode(value)
    row = [0] * 1000
    assert len(encode([row] * 1000)) < 2**21
    for value in ([[row] * 1000] * 1000, "x" * 2**21, 1 << 2**25):
        with pytest.raises(NotEncoded, match="too many"):
            encode(value, 2**21)


@given(VALUES, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_a_value_or_an_error(value, data):
    good = bytearray(encode(value))
    assert typed(decode(bytes(good))) == typed(value)
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for bad in (bytes(good), bytes(good[:cut]), bytes(good) + b"x"):
        try:
            decode(bad)
        except Damaged:
            continue


def head(kind, count):
    return kind + struct.pack("<Q", count)


def test_lists_are_not_written_once_for_many_as_texts_are():
    texts = head(b"R", 2) + encode("a") + b"b" + bytes(2)
    assert decode(head(b"L", 1) + b"b\2" + texts) == ["a", "a"]
    lists = head(b"R", 2) + encode([]) + b"b" + bytes(2)
    with pytest.raises(Damaged, match="list instead of str"):
        decode(head(b"L", 1) + b"b\2" + lists)


@pytest.mark.parametrize(
    "data",
    [b"", b"N", b"N" + b"\xff" * 8, b"I" + b"\1" + bytes(7) + b"z", b"V" * 100, encode([1])[:-1], encode(1) + encode(2)],
)
def test_bytes_of_no_value_are_refused(data):
    with pytest.raises(Damaged):
        decode(data)
