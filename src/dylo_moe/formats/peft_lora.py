"""A plain PEFT LoRA or AdaLoRA directory, and a bag: several of them side by side, without a router."""

from __future__ import annotations

import os
from pathlib import Path

from dylo_moe.errors import ExpertMissing
from dylo_moe.formats.adalora import read_adalora
from dylo_moe.formats.adapter import one_base_model, pickled_weights, read_adapter
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.checkpoint import Checkpoint, Expert
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.patterns import natural_key
from dylo_moe.formats.tokenizer_files import tokenizer_directory

LORA_FORMAT = "peft-lora"
BAG_FORMAT = "lora-bag"
ADALORA_FORMAT = "peft-adalora"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def read_lora(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """One adapter at the root; its expert is called "default", as PEFT would call it."""
    return _read(files, [files.root], ["default"], LORA_FORMAT)


def read_adalora_alone(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """One AdaLoRA adapter at the root, as the plain LoRA that it is."""
    return _read(files, [files.root], ["default"], ADALORA_FORMAT)


def read_bag(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """One adapter per subdirectory, LoRA or AdaLoRA; expert_10 follows expert_9."""
    directories = adapter_directories(files.root)
    if not directories:
        raise ExpertMissing(files.root, "", found="no adapters", expected="subdirectories with adapter_config.json")
    return _read(files, directories, [directory.name for directory in directories], BAG_FORMAT)


def adapter_directories(root: Path) -> list[Path]:
    """Subdirectories that hold an adapter, in natural order of their names; half of one counts, to be refused when it is read."""
    found = [entry for entry in entries(root) if any(os.path.lexists(entry / name) for name in _ADAPTER_FILES)]
    return sorted(found, key=lambda entry: natural_key(entry.name))


def _read_one(files: CheckpointFiles, directory: Path, name: str) -> tuple[Expert, AdapterConfig]:
    kind = files.read_json(directory / "adapter_config.json").get("peft_type")
    return (read_adalora if kind == "ADALORA" else read_adapter)(files, directory, name)


def _read(files: CheckpointFiles, directories: list[Path], names: list[str], name: str) -> Checkpoint:
    files.convert(pickled_weights(files, directories))
    read = [_read_one(files, path, each) for path, each in zip(directories, names, strict=True)]
    return Checkpoint(
        path=files.root,
        format=name,
        base_model=one_base_model(config for _, config in read),
        experts=tuple(expert for expert, _ in read),
        router=None,
        tokenizer=tokenizer_directory(files.root),
    )
