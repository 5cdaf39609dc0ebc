"""The laws there are: read from the check files' source, so that listing and explaining them imports nothing."""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from harness.outcome import Unusable

CHECKS = Path(__file__).parent / "checks"
PREFIX = "check_"


@dataclass(frozen=True)
class Law:
    """One check. statement: the docstring's first paragraph; reason, tolerance: its paragraphs of that name, or ""."""

    id: str
    file: Path
    statement: str
    reason: str
    tolerance: str


def read_laws(directory: Path = CHECKS) -> list[Law]:
    """Every check of every file in `directory`, in file and source order. Raises Unusable when there is none."""
    laws = [law for file in sorted(directory.glob("*.py")) if file.name != "__init__.py" for law in _laws_of(file)]
    if not laws:
        raise Unusable(f"{directory}: no check_*(bench) function in any *.py file here")
    return laws


def _laws_of(file: Path) -> list[Law]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise Unusable(f"{file}: line {error.lineno}: {error.msg}") from error
    return [_law(file, node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(PREFIX)]


def _law(file: Path, node: ast.FunctionDef) -> Law:
    paragraphs = (ast.get_docstring(node) or "").split("\n\n")
    fields = _fields("\n".join(paragraphs[1:]))
    statement = " ".join(paragraphs[0].split())
    return Law(
        f"{file.stem}.{node.name.removeprefix(PREFIX)}", file, statement, fields.get("Reason", ""), fields.get("Tolerance", "")
    )


def _fields(text: str) -> dict[str, str]:
    """ "Reason: a\n  b\nTolerance: c" -> {"Reason": "a b", "Tolerance": "c"}."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in ("Reason", "Tolerance"):
            name, line = head, rest
        if name:
            fields[name] = f"{fields.get(name, '')} {line.strip()}".strip()
    return fields


def select(laws: Sequence[Law], patterns: Sequence[str]) -> list[Law]:
    """The laws that match any id or glob; all of them without patterns. Raises Unusable for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(law.id, pattern) for law in laws):
            raise Unusable(no_such_check(laws, pattern))
    return [law for law in laws if not patterns or any(fnmatchcase(law.id, pattern) for pattern in patterns)]


def no_such_check(laws: Sequence[Law], name: str) -> str:
    """One line with the nearest ids."""
    ids = [law.id for law in laws]
    near = difflib.get_close_matches(name, ids, n=3, cutoff=0.4) or [i for i in ids if name.strip("*.") in i][:3]
    return f"no check {name!r}; " + (f"did you mean {', '.join(near)}?" if near else "--list shows all of them")


def explain(law: Law, *, gate: Sequence[str], width: int = 100) -> str:
    """What --explain prints: statement, reason, tolerance, and what the gate says, a paragraph each."""
    parts = [
        ("Statement", law.statement),
        ("Reason", law.reason),
        ("Tolerance", law.tolerance),
        *(("Gate", line) for line in gate),
    ]
    lines = [law.id]
    for name, text in parts:
        lines += textwrap.wrap(text or "(none given)", width, initial_indent=f"  {name + ':':<11}", subsequent_indent=" " * 13)
    return "\n".join(lines)
