"""docs/conformance.md: every law against every implementation, from one verdict each.

    python -m harness.conformance --output docs/conformance.md

judges each subject on the specimens that it reads and writes the matrix; `--verdict FILE` takes a verdict that is there already,
of a subject of your own for example. A cell that fails must be explained: conformance.toml names the heading of docs/findings.md
that reproduces it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from harness import outcome
from harness.outcome import Unusable
from harness.report import MARKS, environment
from harness.verdict import read_verdict, write_text

SUBJECTS = ("dylo-moe", "naive-loop", "multi-pass", "peft-xlora", "peft-arrow")
FINDINGS = Path(__file__).parent / "conformance.toml"
# From worst to best: a law holds for an implementation when it holds on all of its specimens.
SEVERITY = (outcome.ERROR, outcome.FAIL, outcome.INCONCLUSIVE, outcome.VOID, outcome.PASS, outcome.NOT_APPLICABLE)
FAILED = (outcome.ERROR, outcome.FAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 with one line where a failing cell has no finding."""
    parser = argparse.ArgumentParser(prog="python -m harness.conformance", description="Laws against implementations.")
    parser.add_argument("--output", type=Path, default=Path("docs/conformance.md"))
    parser.add_argument("--subject", action="append", help=f"repeatable; default: {', '.join(SUBJECTS)}")
    parser.add_argument("--verdict", action="append", type=Path, default=[], help="a verdict.json to show; repeatable")
    options = parser.parse_args(arguments)
    try:
        shown = {verdict["subject"]: verdict for verdict in map(read_verdict, options.verdict)}
        subjects = options.subject or [*SUBJECTS, *(subject for subject in shown if subject not in SUBJECTS)]
        verdicts = [shown[subject] if subject in shown else judged(subject) for subject in subjects]
        page = conformance(verdicts, tomllib.loads(FINDINGS.read_text(encoding="utf-8")))
    except Unusable as error:
        print(error, file=sys.stderr)
        return outcome.EXIT_UNUSABLE
    write_text(options.output, page)
    return outcome.EXIT_PASSED


def judged(subject: str) -> dict:
    """The verdict on a subject, made by the command in a process of its own, whatever the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "verdict.json"
        command = [sys.executable, "-m", "harness.cli", "--subject", subject, "--json", str(path)]
        done = subprocess.run([*command, "--html", str(path.with_suffix(".html"))], check=False)
        if not path.exists():
            raise SystemExit(f"--subject {subject}: exit code {done.returncode} and no verdict")
        return read_verdict(path)


def conformance(verdicts: Sequence[Mapping], findings: Mapping[str, Mapping[str, str]]) -> str:
    """The page, in Markdown.

    findings: subject -> {glob of law ids: heading in docs/findings.md}.

    Raises:
        Unusable: a law fails for a subject and no heading explains it; the message names all of them.
    """
    tables = [cells(verdict) for verdict in verdicts]
    unexplained = [
        f"{verdict['subject']}: {law}"
        for verdict, table in zip(verdicts, tables, strict=True)
        for law, (worst, _) in table.items()
        if worst in FAILED and heading(findings, verdict["subject"], law) is None
    ]
    if unexplained:
        raise Unusable(f"{FINDINGS.name}: no finding for {'; '.join(unexplained)}")
    laws = dict.fromkeys(law for table in tables for law in table)
    rows = [
        (law, [_cell(v["subject"], law, t.get(law), findings) for v, t in zip(verdicts, tables, strict=True)]) for law in laws
    ]
    return environment(autoescape=False).get_template("conformance.md").render(verdicts=verdicts, rows=rows, marks=MARKS)


def cells(verdict: Mapping) -> dict[str, tuple[str, str]]:
    """Law -> (its worst outcome over the specimens, "2 of 5" where only some have it)."""
    found: dict[str, list[str]] = {}
    for checkpoint in verdict["checkpoints"]:
        for check in checkpoint["checks"]:
            found.setdefault(check["id"], []).append(check["outcome"])
    return {law: _worst(outcomes) for law, outcomes in found.items()}


def heading(findings: Mapping[str, Mapping[str, str]], subject: str, law: str) -> str | None:
    """The heading of docs/findings.md that explains why this law fails for this subject; None where there is none."""
    return next((text for glob, text in findings.get(subject, {}).items() if fnmatchcase(law, glob)), None)


def anchor(text: str) -> str:
    """The anchor that Markdown viewers give a heading."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _worst(outcomes: Sequence[str]) -> tuple[str, str]:
    worst = min(outcomes, key=SEVERITY.index)
    judged_on = [each for each in outcomes if each != outcome.NOT_APPLICABLE]
    count = outcomes.count(worst)
    return worst, f" {count} of {len(judged_on)}" if worst in FAILED and count < len(judged_on) else ""


def _cell(subject: str, law: str, found: tuple[str, str] | None, findings: Mapping[str, Mapping[str, str]]) -> str:
    if found is None:
        return ""
    worst, count = found
    mark = f"{MARKS[worst]}{count}"
    if worst not in FAILED:
        return mark
    return f"[{mark}](findings.md#{anchor(heading(findings, subject, law))})"


if __name__ == "__main__":
    sys.exit(main())
