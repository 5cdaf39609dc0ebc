"""Strict JSON: what Python's parser lets through (duplicate keys, NaN, endless integers, deep nesting) is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dylo_moe.errors import InvalidField, NonFiniteTensor, UnreadableFile

# A 64-bit integer has at most 20 characters with its sign; nothing in a configuration needs more.
MAX_INTEGER_CHARACTERS = 20


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        UnreadableFile: not UTF-8, not JSON, nested too deeply, or not an object.
        InvalidField: a key occurs twice, or an integer has more than 20 characters.
        NonFiniteTensor: a number is NaN or infinite.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, file),
            parse_int=lambda text: _integer(text, file),
        )
    except UnicodeDecodeError as error:
        raise UnreadableFile(file, "", found=f"a byte that is not UTF-8 at {error.start}", expected="JSON") from error
    except json.JSONDecodeError as error:
        found = f"invalid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        raise UnreadableFile(file, "", found=found, expected="a JSON object") from error
    except RecursionError as error:
        raise UnreadableFile(file, "", found="JSON nested too deeply", expected="a JSON object") from error
    if not isinstance(value, dict):
        raise UnreadableFile(file, "", found=f"JSON of type {type(value).__name__}", expected="a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InvalidField(file, key, found="the key twice", expected="each key once")
        _refuse_non_finite(value, key, file)
        result[key] = value
    return result


def _refuse_non_finite(value: object, key: str, file: Path) -> None:
    pending = [value]  # objects inside were checked when they were closed; only lists need to be opened
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise NonFiniteTensor(file, key, found=item, expected="a finite number")


def _integer(text: str, file: Path) -> int:
    if len(text) > MAX_INTEGER_CHARACTERS:
        found = f"an integer of {len(text)} characters, {text[:12]}..."
        raise InvalidField(file, "", found=found, expected=f"at most {MAX_INTEGER_CHARACTERS}")
    return int(text)
