"""Names and regular expressions of adapter configurations, matched as PEFT matches them but under a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import regex

from dylo_moe.errors import InvalidField

Value = TypeVar("Value")

_PREFIXES = ("foundation_model.", "base_model.model.")
MAX_PATTERN_CHARACTERS = 1_000
# A sane pattern needs microseconds per name; a hostile one needs years.
SECONDS_PER_MATCH = 0.2
_PLAIN = regex.compile(r"(?:[A-Za-z0-9_.]|\\\.)+")


@dataclass
class MatchBudget:
    """Seconds that all patterns of one configuration may take together; matching uses them up."""

    seconds: float = 2.0


def pattern_value(
    patterns: Mapping[str, Value], module: str, default: Value, *, file: Path, field: str, budget: MatchBudget
) -> Value:
    """The value of the first pattern that matches the end of a module's path, at a dot; `default` where none does.

    The rule of PEFT's rank_pattern and alpha_pattern (peft.utils.other.get_pattern_key).
    """
    for pattern, value in patterns.items():
        if _PLAIN.fullmatch(pattern):
            if _ends_like(module, pattern.replace("\\.", "\0")):
                return value
        elif fullmatch(rf"(?:.*\.)?(?:{pattern})", module, file=file, field=field, budget=budget):
            return value
    return default


def _ends_like(module: str, pattern: str) -> bool:
    """A pattern of letters, digits, _, any character (".") and dots ("\\0"), without starting a regular expression engine."""
    start = len(module) - len(pattern)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(
        wanted in (".", char) or (wanted == "\0" and char == ".") for wanted, char in zip(pattern, module[start:], strict=True)
    )


def fullmatch(pattern: str, text: str, *, file: Path, field: str, budget: MatchBudget) -> bool:
    """Whether the pattern matches the whole text; see `find`."""
    return find(pattern, text, file=file, field=field, budget=budget) is not None


def find(pattern: str, text: str, *, file: Path, field: str, budget: MatchBudget) -> regex.Match | None:
    """The match of the pattern with the whole text.

    Raises:
        InvalidField: the pattern is longer than 1,000 characters, is not a regular expression, or takes too long.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise InvalidField(file, field, found=f"a pattern of {len(pattern):,} characters", expected="a short pattern")
    started = time.monotonic()
    try:
        if budget.seconds <= 0:
            raise TimeoutError
        return regex.fullmatch(pattern, text, timeout=min(SECONDS_PER_MATCH, budget.seconds))
    except TimeoutError as error:
        found = f"{pattern[:80]!r}, which takes more than {SECONDS_PER_MATCH} s to match"
        raise InvalidField(file, field, found=found, expected="plain module names") from error
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        found = f"{pattern[:80]!r} ({error})"
        raise InvalidField(file, field, found=found, expected="a regular expression or plain module names") from error
    finally:
        budget.seconds -= time.monotonic() - started


def module_of(key: str) -> str:
    """The path in the base model: without the prefixes of PEFT and of DyLoRA-MoE."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def ends_with(module: str, name: str) -> bool:
    """PEFT's rule for a plain target name: the whole path, or its end at a dot."""
    return module == name or module.endswith(f".{name}")


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which expert_10 follows expert_9."""
    parts = regex.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)


def natural_sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural_key)
