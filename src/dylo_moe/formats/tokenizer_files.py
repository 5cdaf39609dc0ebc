"""Which files of a directory belong to a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

_TOKENIZER_FILE = re.compile(
    r"tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|chat_template\.(jinja|json)"
)


def tokenizer_directory(directory: Path) -> Path | None:
    """`directory` if a tokenizer can be loaded from it, else None."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return directory if any((directory / name).is_file() for name in names) else None


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a directory, sorted by name."""
    return sorted(path for path in directory.iterdir() if _TOKENIZER_FILE.fullmatch(path.name) and path.is_file())
