"""A checkpoint's identity: one hash of everything in it that was trained or chosen, wherever it lies on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

LOCATION_FIELDS = ("base_model_name_or_path", "_name_or_path")
# What lies beside a model and no loader reads; competence.json is the judge's own note of what it planted.
IGNORED = {".git", ".cache", "__pycache__", "README.md", ".gitattributes", "competence.json"}


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over (relative name, SHA-256 of content) of every file, sorted by name.

    JSON files are read without the fields that say where the base model lies: moving a checkpoint does not change what it is.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and not _ignored(f.relative_to(path)))
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        total.update(f"{name}\0{_file_hash(file)}\n".encode())
    return total.hexdigest()


def _ignored(relative: Path) -> bool:
    return any(part in IGNORED for part in relative.parts)


def _file_hash(file: Path) -> str:
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if isinstance(content, dict):
            kept = {name: value for name, value in content.items() if name not in LOCATION_FIELDS}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
