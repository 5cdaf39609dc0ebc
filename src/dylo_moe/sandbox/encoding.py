"""Values as bytes, without pickle: what generated code returns is read by a process that it must not be able to harm.

A value is a column of one element, and a column is a list of values. Columns of one type are packed by C code (array, join), and
lists of lists become one flat column and the lengths, so that millions of small tuples cost little. A column is one byte for its
kind, eight for the number of its elements, each of which takes at least one more byte:

    N None  O opaque                        zeros
    B bool  F float                         packed numbers
    I int in 8 bytes                        numbers: one byte for their width, packed numbers
    J int  S str  Y bytes                   numbers for the lengths, the number of bytes, all bytes together
    R str, few of them different            a column of the texts, the numbers of the texts
    C complex                               packed real parts, packed imaginary parts
    L list  T tuple  E set  Z frozenset     numbers for the lengths, a column of all elements
    D dict  K Counter  A OrderedDict        the same, a column of all keys, a column of all values
    Q deque  G range  P Fraction  M Decimal  V numpy array or scalar     a column of tuples that describe them
    X mixed                                 the kind of each element, then a column per kind, in the order of the letters

Opaque is everything else: functions, iterators, classes with an `==` of their own. It equals nothing, not even itself. A subclass
with its base's `==` becomes what its base is.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from operator import ne
from typing import Any

import numpy as np

MAX_DEPTH = 64
MAX_EXPONENT = 5000  # of a Decimal; beyond it a comparison with an int takes for ever
ARRAY_KINDS = "biufcSU"
NUMBERS = "bhiq"  # typecodes of array
_SMALL = 128
_FEW = 8  # where each text comes up more often than this, on average, it is written once
_KINDS = {
    type(None): b"N",
    bool: b"B",
    int: b"I",
    float: b"F",
    complex: b"C",
    str: b"S",
    bytes: b"Y",
    list: b"L",
    tuple: b"T",
    set: b"E",
    frozenset: b"Z",
    dict: b"D",
    Counter: b"K",
    OrderedDict: b"A",
    deque: b"Q",
    range: b"G",
    Fraction: b"P",
    Decimal: b"M",
}
# How a subclass becomes its base, past whatever methods it overrides.
_BASES = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__mul__(value, 1.0),
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: lambda value: list.__getitem__(value, slice(None)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
}
_SET_VIEWS = (type({}.keys()), type({}.items()))


class NotEncoded(ValueError):
    """The value is nested too deeply, or its bytes would be too many."""


def encode(value: Any, limit: int = sys.maxsize) -> bytes:
    """Raises NotEncoded where there would be more than `limit` bytes."""
    writer = _Writer(limit)
    writer.column([value], 0)
    return b"".join(writer.parts)


def encode_and_ask(value: Any) -> tuple[bytes, bool]:
    """The bytes, and whether whatever has the same bytes equals the value. NaN, arrays and what is opaque do not."""
    writer = _Writer(sys.maxsize)
    writer.column([value], 0)
    return b"".join(writer.parts), writer.reflexive


class _Writer:
    def __init__(self, limit: int) -> None:
        self.parts: list[bytes] = []
        self.left = limit
        self.reflexive = True

    def column(self, values: list, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise NotEncoded(f"nested in more than {MAX_DEPTH} levels")
        types = set(map(type, values))
        kinds = {_KINDS.get(kind) for kind in types}
        if len(kinds) == 1 and kinds.isdisjoint({None, b"M"}):
            self._of_one_kind(kinds.pop(), values, depth)
            return
        pairs = [_plain(value) for value in values]
        kinds = sorted({kind for kind, _ in pairs})
        if len(kinds) != 1:
            self._head(b"X", values)
            self._put(b"".join(kind for kind, _ in pairs))
        for kind in kinds:
            self._of_one_kind(kind, [value for found, value in pairs if found == kind], depth)

    def _of_one_kind(self, kind: bytes, values: list, depth: int) -> None:
        texts = list(dict.fromkeys(values)) if kind == b"S" else []
        if kind == b"S" and len(texts) * _FEW < len(values):
            kind = b"R"
        if kind == b"I" and not -(2**63) <= min(values) <= max(values) < 2**63:
            kind = b"J"
        self._head(kind, values)
        self.reflexive &= kind not in b"OVM" and not (kind in b"FC" and any(map(ne, values, values)))
        if kind in b"NO":
            self._put(bytes(len(values)))
        elif kind in b"BIFC":
            self._fixed(kind, values)
        elif kind in b"JSY":
            self._joined(kind, values)
        elif kind == b"R":
            self.column(texts, depth)
            self._places(dict(zip(texts, range(len(texts)), strict=True)), values)
        elif kind in b"LTEZDKA":
            self._nested(kind, values, depth)
        else:
            self.column([_description(kind, value) for value in values], depth + 1)

    def _fixed(self, kind: bytes, values: list) -> None:
        if kind == b"B":
            self._put(bytes(values))
        elif kind == b"I":
            self._numbers(values)
        elif kind == b"F":
            self._put(array("d", values).tobytes())
        else:
            self._put(array("d", [z.real for z in values]).tobytes() + array("d", [z.imag for z in values]).tobytes())

    def _joined(self, kind: bytes, values: list) -> None:
        if kind == b"J":
            values = [value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True) for value in values]
        self._numbers(list(map(len, values)))
        data = "".join(values).encode("utf-8", "surrogatepass") if kind == b"S" else b"".join(values)
        self._put(struct.pack("<Q", len(data)))
        self._put(data)

    def _nested(self, kind: bytes, values: list, depth: int) -> None:
        lengths = list(map(len, values))
        if sum(lengths) > self.left:  # before they are collected
            raise NotEncoded("too many elements")
        self._numbers(lengths)
        self._column_or_nothing(chain.from_iterable(values), depth)
        if kind in b"DKA":
            self._column_or_nothing(chain.from_iterable(value.values() for value in values), depth)

    def _column_or_nothing(self, values: Iterable, depth: int) -> None:
        found = list(values)
        if found:
            self.column(found, depth + 1)
        else:
            self._head(b"N", found)

    def _places(self, places: dict[str, int], values: list[str]) -> None:
        """As numbers; Mbpp/255 has a hundred million of them."""
        if len(places) <= _SMALL:
            self._put(b"b" + bytes(map(places.__getitem__, values)))
        else:
            self._numbers(list(map(places.__getitem__, values)))

    def _numbers(self, values: Sequence[int]) -> None:
        low, high = min(values), max(values)
        code = next(code for code, bits in zip(NUMBERS, (7, 15, 31, 63), strict=True) if -(1 << bits) <= low <= high < 1 << bits)
        self._put(code.encode() + array(code, values).tobytes())

    def _head(self, kind: bytes, values: list) -> None:
        self._put(kind + struct.pack("<Q", len(values)))

    def _put(self, data: bytes) -> None:
        self.left -= len(data)
        if self.left < 0:
            raise NotEncoded("too many bytes")
        self.parts.append(data)


def _plain(value: Any) -> tuple[bytes, Any]:
    """Kind and value, which is of the very type that the kind stands for."""
    kind = _KINDS.get(type(value))
    if kind == b"M" and value.is_finite() and not -MAX_EXPONENT <= value.adjusted() <= MAX_EXPONENT:
        return b"O", None
    if kind is not None:
        return kind, value
    if isinstance(value, np.generic | np.ndarray):
        return (b"V", value) if value.dtype.kind in ARRAY_KINDS and not value.dtype.hasobject else (b"O", None)
    if isinstance(value, _SET_VIEWS):
        return _view(value)
    if type(value) is bytearray:
        return b"Y", bytes(value)
    for base, convert in _BASES.items():
        if isinstance(value, base) and type(value).__eq__ is base.__eq__:
            return _KINDS[base], convert(value)
    return b"O", None


def _view(value: Any) -> tuple[bytes, Any]:
    """Keys or items of a dict, which equal a set of the same elements."""
    try:
        return b"E", set(value)
    except TypeError:  # items with a list among them equal no set
        return b"O", None


def _description(kind: bytes, value: Any) -> tuple:
    if kind == b"Q":
        return tuple(value)
    if kind == b"G":
        return value.start, value.stop, value.step
    if kind == b"P":
        return value.numerator, value.denominator
    if kind == b"M":
        return (str(value),)
    shape = value.shape if isinstance(value, np.ndarray) else None
    return value.dtype.str, shape, value.tobytes()
