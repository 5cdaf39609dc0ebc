"""What decides the content of a sample file: two runs that agree here would write the same samples."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from dylo_moe.formats import Checkpoint, combined_hash
from dylo_moe.formats.tokenizer_files import tokenizer_files

SCHEMA = 2
# The last two are what EvalPlus's sanitizer parses with.
PACKAGES = ("dylo-moe", "torch", "transformers", "peft", "tokenizers", "evalplus", "tree-sitter", "tree-sitter-python")
# Kernels and loaders that compute where a base model is quantised or spread over devices.
OPTIONAL_PACKAGES = ("accelerate", "bitsandbytes", "torchao", "hqq", "gptqmodel", "flash-attn", "kernels")
# *.py: what transformers runs with trust_remote_code.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "quantize_config.json", "*.py")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


def checkpoint_identity(checkpoint: Checkpoint, base: str | Path | None) -> dict[str, str | None]:
    """Hashes of everything on disk that decides what the model computes.

    Args:
        base: directory or hub id of the base model; None where the checkpoint holds all weights itself.
    """
    own = Path(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return {
        "checkpoint": combined_hash(checkpoint.hashes),
        "tokenizer": None if own is None else _combined(own, tokenizer_files(own)),
        "base": None if base is None else base_hash(base),
    }


@cache
def versions() -> Mapping[str, str]:
    """Versions of everything that decides what is generated; our own also by its source, which changes between releases."""
    python = ".".join(platform.python_version_tuple()[:2])
    required = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": python, "dylo-moe source": _SOURCE, **required, **_installed(OPTIONAL_PACKAGES)}


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def identity_hash(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(found: Any, other: Any, name: str = "") -> str:
    """The first field in which two identities differ, with both values: "versions.torch 2.12.0, here 2.13.0"."""
    if isinstance(found, dict) and isinstance(other, dict):
        for key in sorted(found.keys() | other.keys()):
            if found.get(key) != other.get(key):
                return difference(found.get(key), other.get(key), f"{name}.{key}" if name else key)
    return f"{name} {str(found)[:60]}, here {str(other)[:60]}"


def local_directory(base: str | Path) -> Path | None:
    """Where a base model lies on this machine: the directory itself, or the hub's cache; None if it is not here yet."""
    if Path(base).is_dir():
        return Path(base)
    cached = try_to_load_from_cache(str(base), "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def base_hash(base: str | Path) -> str:
    """Of a model's files, tokenizer included; "hub:NAME" where they are not on this machine."""
    directory = local_directory(base)
    if directory is None:
        return f"hub:{base}"
    files = {path for pattern in _MODEL_FILES for path in directory.glob(pattern)}
    return _combined(directory, [*sorted(files), *tokenizer_files(directory)])


def _combined(directory: Path, files: list[Path]) -> str:
    return combined_hash({str(path.relative_to(directory)): _file_hash(path) for path in files})


def _file_hash(path: Path) -> str:
    """SHA-256 of a file. A large file in the hub's cache is named by it, so it need not be read."""
    name = path.resolve().name
    if path.is_symlink() and _HUB_BLOB.fullmatch(name):
        return name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# Read when this is imported, with the code that runs: an editable installation may change under a long run.
_SOURCE = _combined(Path(__file__).parent, sorted(Path(__file__).parent.rglob("*.py")))[:16]
