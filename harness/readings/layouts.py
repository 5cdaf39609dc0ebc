"""The judge's own, shorter rules for which layout a checkpoint has. Names are those of dylo_moe's formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from harness.readings.files import read_json

NATIVE = "dylo-moe"
_OF_PEFT_TYPE = {
    "ADALORA": "peft-adalora",
    "XLORA": "peft-xlora",
    "POLY": "peft-poly",
    "MIXLORA": "mixlora",
    "LORAMOE": "moe-peft-loramoe",
    "MOLA": "moe-peft-mola",
    "MOLE": "adamole",
    "ADAMOLE": "adamole",
}


def layout_of(path: Path) -> str:
    """One of dylo_moe's format names, or "unknown"."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    rules: list[tuple[str, Callable[[], bool]]] = [
        (NATIVE, lambda: "moe_config.json" in names),
        ("dylora-separated", lambda: "peft_adapters" in names),
        ("dylora-bundle", lambda: path.is_file() or names == {"checkpoint.pt"}),
        ("xlora", lambda: "xlora_config.json" in names),
        ("mergoo", lambda: "adapter_configs" in _config(path)),
        ("dylora-full-state", lambda: _holds_full_state(path, names)),
        ("peft-arrow", lambda: "adapter_config.json" not in names and (path / "arrow_router/adapter_config.json").is_file()),
        (_of_adapter(path) if "adapter_config.json" in names else "", lambda: "adapter_config.json" in names),
        ("lora-bag", lambda: any((path / name / "adapter_config.json").is_file() for name in names)),
        ("merged", lambda: "config.json" in names),
    ]
    return next((name for name, rule in rules if rule()), "unknown")


def _of_adapter(path: Path) -> str:
    kind = read_json(path / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        return _OF_PEFT_TYPE.get(kind, "unknown")
    names = _tensor_names(path)
    if any(".lora_route." in name for name in names):
        return "loramoe" if any(".lora_A0." in name for name in names) else "hydralora"
    return "mola" if any(".router.router." in name for name in names) else "peft-lora"


def _tensor_names(path: Path) -> list[str]:
    file = path / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    pickled = path / "adapter_model.bin"
    return list(torch.load(pickled, map_location="meta", weights_only=True)) if pickled.is_file() else []


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json") if (path / "config.json").is_file() else {}


def _holds_full_state(path: Path, names: set[str]) -> bool:
    if any(name.startswith("dylo_moe_weights") for name in names) or "dylo_moe_state" in names:
        return True
    if "model.safetensors" in names:
        with safe_open(path / "model.safetensors", "pt") as opened:
            return any(key.startswith("foundation_model.") for key in opened.keys())
    return "pytorch_model.bin" in names
