"""Comparison with an earlier verdict: outcomes that got worse, numerics that loosened, ratios that left their band in either
direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness import outcome
from harness.gate import Gate, Problem
from harness.machine import describe_commit
from harness.outcome import Unusable
from harness.verdict import number, write_verdict

# From best to worst; "not applicable" after "pass": a law that no longer covers a checkpoint has lost something.
BADNESS = {
    outcome.PASS: 0,
    outcome.NOT_APPLICABLE: 1,
    outcome.VOID: 2,
    outcome.INCONCLUSIVE: 2,
    outcome.FAIL: 3,
    outcome.ERROR: 3,
}


def refuse_foreign(path: Path, baseline: Mapping, environment: Mapping[str, str], checkpoints: list[Mapping]) -> None:
    """Raises Unusable where the baseline is of another environment, device or checkpoint: its numbers say nothing here.

    checkpoints: dicts with name, hash, device and dtype of what is about to be judged.
    """
    for field, here in environment.items():
        there = baseline["environment"].get(field)
        if there != here:
            raise Unusable(
                f"{path}: environment.{field}: the baseline was made with {there!r}, this run has {here!r}; make one here"
            )
    known = {(entry["hash"], entry["device"], entry["dtype"]) for entry in baseline["checkpoints"]}
    for checkpoint in checkpoints:
        if (checkpoint["hash"], checkpoint["device"], checkpoint["dtype"]) not in known:
            raise Unusable(
                f"{path}: the baseline does not hold checkpoint {checkpoint['name']!r} (hash {checkpoint['hash'][:12]}, "
                f"{checkpoint['device']}, {checkpoint['dtype']}); it holds "
                + ", ".join(f"{entry['name']!r} ({entry['hash'][:12]})" for entry in baseline["checkpoints"])
            )


def refuse_unfit_tree(directory: Path) -> None:
    """A baseline is only made of a commit that can be found again. Raises Unusable elsewhere."""
    commit = describe_commit(directory)
    if commit["id"] is None:
        raise Unusable(
            f"--update-baseline: {directory} is not in a git repository; a baseline is made from a clean, tagged commit"
        )
    if not commit["clean"]:
        raise Unusable(f"--update-baseline: the git tree of {directory} has uncommitted changes; commit or remove them first")
    if commit["tag"] is None:
        raise Unusable(f"--update-baseline: commit {commit['id'][:12]} has no tag; tag the release first")


def regressions(gate: Gate, baseline: Mapping, checkpoints: list[Mapping]) -> list[Problem]:
    """What is worse than in the baseline, or so much better that the baseline is stale."""
    earlier = {(entry["hash"], entry["device"], entry["dtype"]): entry for entry in baseline["checkpoints"]}
    found = []
    for checkpoint in checkpoints:
        before = {
            check["id"]: check for check in earlier[checkpoint["hash"], checkpoint["device"], checkpoint["dtype"]]["checks"]
        }
        for check in checkpoint["checks"]:
            if check["id"] in before:
                found += [
                    Problem(
                        "fail" if gate.rule(check["id"]).required else "advisory", checkpoint["name"], check["id"], kind, message
                    )
                    for kind, message in _worse(gate, before[check["id"]], check)
                ]
    return found


def _worse(gate: Gate, before: Mapping, now: Mapping) -> Iterator[tuple[str, str]]:
    if BADNESS[now["outcome"]] > BADNESS[before["outcome"]]:
        yield "worse than the baseline", f"was {before['outcome']} in the baseline, is {now['outcome']}"
    was, needs = _tolerance(before), _tolerance(now)
    if was is not None and needs is not None:
        allowed = gate.threshold("tolerance_growth") * max(was, gate.threshold("tolerance_noise"))
        if needs > allowed:
            yield (
                "worse than the baseline",
                f"needs {needs:.3g} of its bound, in the baseline {was:.3g}; at most {allowed:.3g} is no regression",
            )
    for name, ratio in now["evidence"].get("ratios", {}).items():
        earlier = before["evidence"].get("ratios", {}).get(name)
        if earlier is not None:
            yield from _out_of_band(gate, name, earlier, ratio)


def _tolerance(check: Mapping) -> float | None:
    value = check["evidence"].get("required_tolerance")
    return None if value is None else number(value)


def _out_of_band(gate: Gate, name: str, before: Mapping, now: Mapping) -> Iterator[tuple[str, str]]:
    """A time is out of its band when even the nearer end of its confidence interval is; a count when it is."""
    band = gate.threshold("time_band" if now["kind"] == "time" else "count_band")
    was, value = number(before["ratio"]), number(now["ratio"])
    low, high = number(now.get("low", value)), number(now.get("high", value))
    told = f"{name} is {value:.4g}, in the baseline {was:.4g}, band +-{band:.0%}"
    if math.isnan(value) or low > was * (1 + band):
        yield "worse than the baseline", told
    elif high < was * (1 - band):
        yield "better than the baseline", f"{told}: the baseline is stale, make a new one (--update-baseline)"


def update(path: Path, document: Mapping) -> None:
    """Writes this verdict as the baseline. Raises Unusable where something failed: a baseline holds what is right."""
    if document["exit_code"] != outcome.EXIT_PASSED:
        raise Unusable(f"--update-baseline: the verdict is {document['verdict']!r}; {path} is left as it was")
    write_verdict(path, document)
