"""What a running solution tells: whether it could be loaded, then one record per input, in order."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

LOADED, NOT_LOADED, VALUE, ERROR, TIMEOUT, TOO_LARGE = b"o", b"x", b"v", b"e", b"t", b"l"
_KINDS = (LOADED, NOT_LOADED, VALUE, ERROR, TIMEOUT, TOO_LARGE)
_HEAD = struct.Struct("<cQ")


def record(kind: bytes, payload: bytes = b"") -> bytes:
    return _HEAD.pack(kind, len(payload)) + payload


def read_records(chunks: Iterable[bytes], largest: int) -> Iterator[tuple[bytes, bytes]]:
    """(kind, payload) of every whole record.

    One of more than `largest` bytes is TOO_LARGE, and the last. Nor is anything looked at after what is no record.
    """
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while len(pending) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(pending)
            if kind not in _KINDS:
                return
            if size > largest:
                yield TOO_LARGE, b""
                return
            if len(pending) < _HEAD.size + size:
                break
            yield kind, bytes(pending[_HEAD.size : _HEAD.size + size])
            del pending[: _HEAD.size + size]
