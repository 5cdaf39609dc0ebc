"""Bytes of `encoding` as values again. Bytes from anywhere give values of known types or an error, and nothing else happens."""

from __future__ import annotations

import struct
from array import array
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from dylo_moe.sandbox.encoding import ARRAY_KINDS, MAX_DEPTH, MAX_EXPONENT, NUMBERS

_SEQUENCES = {b"L": list, b"T": tuple, b"E": set, b"Z": frozenset}
_MAPPINGS = {b"D": dict, b"K": Counter, b"A": OrderedDict}


class Damaged(ValueError):
    """Bytes that `encode` does not write."""


class Opaque:
    """Stands for a value without an encoding; equals nothing."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return False


def decode(data: bytes) -> Any:
    """The value. Takes memory in proportion to the bytes, up to about a hundred times as much.

    Raises:
        Damaged: not the bytes of a value.
    """
    reader = _Reader(data)
    try:
        values = reader.column(0)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, struct.error) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None
    if len(values) != 1 or reader.place != len(data):
        raise Damaged("not one value")
    return values[0]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.place = 0

    def column(self, depth: int) -> list:
        if depth > 2 * MAX_DEPTH:  # a description is a level of its own
            raise Damaged("nested too deeply")
        kind = bytes(self._take(1))
        (count,) = struct.unpack("<Q", self._take(8))
        if count > len(self.data) - self.place:
            raise Damaged("more elements than bytes")
        values = self._body(kind, count, depth)
        if len(values) != count:
            raise Damaged("not as many elements as it says")
        return values

    def _body(self, kind: bytes, count: int, depth: int) -> list:
        if kind in b"NO":
            self._take(count)
            return [None] * count if kind == b"N" else [Opaque() for _ in range(count)]
        if kind == b"B":
            return list(map(bool, self._take(count)))
        if kind == b"F":
            return self._packed("d", count)
        if kind == b"C":
            return list(map(complex, self._packed("d", count), self._packed("d", count)))
        if kind == b"I":
            return self._numbers(count)
        if kind in b"JSY":
            return self._joined(kind, count)
        if kind == b"R":
            texts = [_typed(str, text) for text in self.column(depth + 1)]  # lists within lists could stand for any number
            return [texts[number] for number in self._numbers(count)]
        if kind == b"X":
            return self._mixed(bytes(self._take(count)), depth)
        if kind in _SEQUENCES or kind in _MAPPINGS:
            return self._nested(kind, count, depth)
        return [_build(kind, description) for description in self.column(depth + 1)]

    def _joined(self, kind: bytes, count: int) -> list:
        lengths = self._lengths(count)
        (size,) = struct.unpack("<Q", self._take(8))
        data = bytes(self._take(size))
        if kind == b"S":
            data = data.decode("utf-8", "surrogatepass")
        if sum(lengths) != len(data):
            raise Damaged("lengths that do not add up")
        found, start = [], 0
        for length in lengths:
            found.append(data[start : start + length])
            start += length
        return [int.from_bytes(part, "little", signed=True) for part in found] if kind == b"J" else found

    def _nested(self, kind: bytes, count: int, depth: int) -> list:
        lengths = self._lengths(count)
        elements = self.column(depth + 1)
        if sum(lengths) != len(elements):
            raise Damaged("lengths that do not add up")
        items = iter(elements)
        if kind in _MAPPINGS:
            items = zip(elements, self.column(depth + 1), strict=True)
        build = _SEQUENCES.get(kind, dict)
        found = [build(islice(items, length)) for length in lengths]
        return found if build is not dict or kind == b"D" else [_MAPPINGS[kind](value) for value in found]

    def _mixed(self, kinds: bytes, depth: int) -> list:
        columns = {kind: iter(self.column(depth + 1)) for kind in sorted(set(kinds))}
        values = [next(columns[kind], columns) for kind in kinds]
        if any(end is columns for end in values) or any(next(column, columns) is not columns for column in columns.values()):
            raise Damaged("a column of another length")
        return values

    def _lengths(self, count: int) -> list[int]:
        lengths = self._numbers(count)
        if lengths and min(lengths) < 0:
            raise Damaged("a negative length")
        return lengths

    def _numbers(self, count: int) -> list[int]:
        code = bytes(self._take(1)).decode("ascii")
        if code not in NUMBERS:
            raise Damaged(f"numbers of kind {code!r}")
        return self._packed(code, count)

    def _packed(self, code: str, count: int) -> list:
        numbers = array(code)
        numbers.frombytes(self._take(count * numbers.itemsize))
        return numbers.tolist()

    def _take(self, size: int) -> memoryview:
        if size > len(self.data) - self.place:
            raise Damaged("cut off")
        self.place += size
        return self.data[self.place - size : self.place]


def _build(kind: bytes, description: Any) -> Any:
    if kind == b"Q":
        return deque(_typed(tuple, description))
    if kind == b"G":
        return range(*(_typed(int, part) for part in description))
    if kind == b"P":
        numerator, denominator = (_typed(int, part) for part in description)
        return Fraction(numerator, denominator)
    if kind == b"M":
        (text,) = description
        return _decimal(_typed(str, text))
    if kind == b"V":
        return _array(*description)
    raise Damaged(f"a column of kind {kind!r}")


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Damaged(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _decimal(text: str) -> Decimal:
    value = Decimal(text)
    if value.is_finite() and not -MAX_EXPONENT <= value.adjusted() <= MAX_EXPONENT:
        raise Damaged("a Decimal out of range")
    return value


def _array(dtype: Any, shape: Any, data: Any) -> Any:
    kind = np.dtype(_typed(str, dtype))
    if kind.kind not in ARRAY_KINDS or kind.hasobject or kind.itemsize == 0:
        raise Damaged(f"an array of {dtype!r}")
    values = np.frombuffer(_typed(bytes, data), dtype=kind)
    if shape is None:
        (scalar,) = values
        return scalar
    return values.reshape([_typed(int, size) for size in _typed(tuple, shape)])
