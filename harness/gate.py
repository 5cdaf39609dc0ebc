"""Thresholds and rules (gate.toml), and the verdict that outcomes, thresholds and a baseline add up to."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from harness import outcome
from harness.outcome import Unusable

GATE_FILE = Path(__file__).parent / "gate.toml"
SCHEMA = 1
# A drift of this name is better when larger; its budget is the least that is accepted.
AGREEMENT = "_agreement"

VERDICTS = {
    outcome.EXIT_PASSED: "pass",
    outcome.EXIT_FAILED: "fail",
    outcome.EXIT_JUDGE_FAILED: "judge failed",
    outcome.EXIT_UNDECIDED: "undecided",
}


@dataclass(frozen=True)
class Rule:
    """Whether the checks that match a glob decide the exit code, and why."""

    checks: str
    required: bool
    reason: str


@dataclass(frozen=True)
class Threshold:
    value: float
    reason: str


@dataclass(frozen=True)
class Problem:
    """One reason why the verdict is not a pass. `kind` is "fail", "undecided", "judge" or "advisory"."""

    kind: str
    checkpoint: str
    check: str
    outcome: str
    message: str

    def as_dict(self) -> dict[str, str]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Gate:
    """rules: tried in order; thresholds and drift budgets by name."""

    rules: tuple[Rule, ...]
    thresholds: Mapping[str, Threshold]
    drift: Mapping[str, Threshold]

    def rule(self, check: str) -> Rule:
        return next(rule for rule in self.rules if fnmatchcase(check, rule.checks))

    def threshold(self, name: str) -> float:
        return self.thresholds[name].value

    def over(self, other: Gate) -> Gate:
        """This gate's entries, and the other's where this one has none."""
        return replace(
            self,
            rules=self.rules + other.rules,
            thresholds={**other.thresholds, **self.thresholds},
            drift={**other.drift, **self.drift},
        )


@cache
def load_gate(path: Path | None = None) -> Gate:
    """The built-in gate, or a user's file over it. Raises Unusable naming the file and the entry at fault."""
    built_in = _parse(GATE_FILE)
    if path is None:
        return built_in
    gate = _parse(path)
    unknown = sorted(set(gate.thresholds) - set(built_in.thresholds))
    if unknown:
        raise Unusable(f"{path}: thresholds.{unknown[0]}: no such threshold; known are {', '.join(sorted(built_in.thresholds))}")
    return gate.over(built_in)


def _parse(path: Path) -> Gate:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Unusable(f"{path}: not a readable TOML file: {error}") from error
    if content.get("schema") != SCHEMA:
        raise Unusable(f"{path}: schema: found {content.get('schema')!r}, expected {SCHEMA}")
    for name in content.keys() - {"schema", "rules", "thresholds", "drift"}:
        raise Unusable(f"{path}: {name}: no such section; known are rules, thresholds, drift")
    return Gate(
        rules=tuple(
            Rule(**_entry(path, f"rules[{i}]", rule, {"checks": str, "required": bool, "reason": str}))
            for i, rule in enumerate(content.get("rules", []))
        ),
        thresholds=_numbers(path, "thresholds", content, "value"),
        drift=_numbers(path, "drift", content, "budget"),
    )


def _numbers(path: Path, section: str, content: dict, field: str) -> dict[str, Threshold]:
    entries = {}
    for name, entry in content.get(section, {}).items():
        found = _entry(path, f"{section}.{name}", entry, {field: int | float, "reason": str})
        entries[name] = Threshold(found[field], found["reason"])
    return entries


def _entry(path: Path, where: str, entry: object, fields: Mapping[str, type]) -> dict:
    if not isinstance(entry, dict) or entry.keys() != fields.keys():
        raise Unusable(f"{path}: {where}: expected exactly the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(entry[name], kind) or (isinstance(entry[name], bool) and kind is not bool):
            raise Unusable(f"{path}: {where}.{name}: found {entry[name]!r}, which has the wrong type")
    return entry


def problems(gate: Gate, checkpoints: Sequence[Mapping], calibration: Sequence[Mapping]) -> list[Problem]:
    """Everything that stands between these results and a pass, in the order in which it was found."""
    found = [
        Problem(
            "judge" if item["outcome"] in (outcome.FAIL, outcome.ERROR) else "undecided",
            "",
            item["id"],
            item["outcome"],
            item["message"],
        )
        for item in calibration
        if item["outcome"] not in (outcome.PASS, outcome.NOT_APPLICABLE)
    ]
    for checkpoint in checkpoints:
        for check in checkpoint["checks"]:
            kind = _kind(check, gate.rule(check["id"]))
            if kind:
                found.append(Problem(kind, checkpoint["name"], check["id"], check["outcome"], check["message"]))
        found += _over_budget(gate, checkpoint)
    outcomes = {check["outcome"] for checkpoint in checkpoints for check in checkpoint["checks"]}
    if outcomes <= {outcome.NOT_APPLICABLE}:
        found.append(Problem("undecided", "", "verdict", outcome.VOID, "no check applied, so nothing was judged"))
    return found


def _kind(check: Mapping, rule: Rule) -> str | None:
    if check["outcome"] in (outcome.PASS, outcome.NOT_APPLICABLE):
        return None
    if check["outcome"] == outcome.ERROR and check.get("blame") == "judge":
        return "judge"
    if not rule.required:
        return "advisory"
    return "undecided" if check["outcome"] in (outcome.VOID, outcome.INCONCLUSIVE) else "fail"


def _over_budget(gate: Gate, checkpoint: Mapping) -> list[Problem]:
    found = []
    for name, budget in gate.drift.items():
        value = checkpoint["drift"].get(name)
        if value is None:
            message = (
                f"a budget is set, but the drift {name!r} was not measured; measured: {', '.join(checkpoint['drift']) or 'none'}"
            )
            found.append(Problem("undecided", checkpoint["name"], f"drift.{name}", outcome.VOID, message))
        elif not (value >= budget.value if name.endswith(AGREEMENT) else value <= budget.value):
            message = f"drift {name} is {value:.4g}, the budget is {budget.value:.4g} ({budget.reason})"
            found.append(Problem("fail", checkpoint["name"], f"drift.{name}", outcome.FAIL, message))
    return found


def exit_code(found: Sequence[Problem]) -> int:
    """The judge's own failure comes first: a verdict by a broken judge is none."""
    kinds = {problem.kind for problem in found}
    if "judge" in kinds:
        return outcome.EXIT_JUDGE_FAILED
    if "fail" in kinds:
        return outcome.EXIT_FAILED
    return outcome.EXIT_UNDECIDED if "undecided" in kinds else outcome.EXIT_PASSED
