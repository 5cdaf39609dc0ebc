"""verdict.json: what a run found, as one JSON document that the schema describes and every report is made from."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import torch

from harness.outcome import OUTCOMES, Unusable

SCHEMA_FILE = Path(__file__).parent / "verdict.schema.json"
SCHEMA_VERSION = 1


@cache
def schema() -> dict:
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def plain(value: object) -> object:
    """The value in JSON's types. Numbers that JSON lacks become the strings "inf", "-inf" and "nan"; arrays become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def number(value: object) -> float:
    """The inverse of `plain` for numbers: "inf" -> inf."""
    return float(value)


def one_line(text: str, limit: int = 600) -> str:
    """The text on one line, without characters that a terminal would obey."""
    flat = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def counts(checkpoints: Sequence[Mapping]) -> dict[str, int]:
    """How many checks ended as what, every outcome named."""
    found = Counter(check["outcome"] for checkpoint in checkpoints for check in checkpoint["checks"])
    return {outcome: found[outcome] for outcome in OUTCOMES}


def write_verdict(path: Path, verdict: Mapping) -> None:
    """Validates against the schema, then replaces `path` in one step. Raises jsonschema.ValidationError: that is the judge's own
    defect.
    """
    document = plain(verdict)
    jsonschema.validate(document, schema(), cls=jsonschema.Draft202012Validator)
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_verdict(path: Path) -> dict:
    """An earlier verdict. Raises Unusable, one line, where the file is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unusable(f"{path}: not a readable verdict: {error}") from error
    version = document.get("schema") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise Unusable(f"{path}: schema: found {version!r}, expected {SCHEMA_VERSION}")
    try:
        jsonschema.validate(document, schema(), cls=jsonschema.Draft202012Validator)
    except jsonschema.ValidationError as error:
        raise Unusable(f"{path}: {'.'.join(map(str, error.absolute_path)) or 'verdict'}: {error.message[:200]}") from error
    return document


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step: a reader sees the old file or the new one. Makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
