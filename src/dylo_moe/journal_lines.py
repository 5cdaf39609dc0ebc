"""Lines that know whether they are whole: "<checksum> <JSON>", so that what a kill or a full disk cut short is seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dylo_moe.errors import SampleFileError

_CHECKSUM_LENGTH = 16
START_ANEW = "move it away, or generate it anew with --resume=False (resume=False in Python)"


def checked_line(payload: dict[str, Any]) -> bytes:
    """One line for a JSON object, line break included."""
    text = json.dumps(payload, sort_keys=True).encode()
    return _checksum(text) + b" " + text + b"\n"


def whole_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects before the first line that is not whole, and how many bytes their lines take.

    Args:
        path: for the message.

    Raises:
        SampleFileError: a whole line follows a broken one, which no interrupted write leaves behind.
    """
    payloads: list[dict[str, Any]] = []
    good, broken = 0, False
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not (line.endswith(b"\n") and checksum == _checksum(text)):
            broken = True
        elif broken:
            raise SampleFileError(f"{path}: damaged after {len(payloads)} lines; {START_ANEW}")
        else:
            payloads.append(json.loads(text))
            good += len(line)
    return payloads, good


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_CHECKSUM_LENGTH].encode()
