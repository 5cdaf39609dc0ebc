"""Tensors of a checkpoint's files, and the adapters that PEFT's own layout holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.artifact import Adapter
from harness.outcome import NotApplicable

PREFIX = "base_model.model."


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(file: Path, expected: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or, weights only, from a pickle.

    Raises ValueError for a name that does not end in one of `expected`, and for NaN or infinity.
    """
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if not name.endswith(expected):
            raise ValueError(f"{file}: {name}: found a foreign tensor, expected names ending in {' or '.join(expected)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name}: found NaN or infinity, expected finite numbers")
    return tensors


def weights_file(directory: Path, *stems: str) -> Path:
    """The first of these files that is there, as .safetensors or as a pickle's .bin or .pt."""
    candidates = [directory / f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin", ".pt")]
    return next((file for file in candidates if file.is_file()), candidates[0])


def read_peft_adapter(directory: Path) -> dict[str, Adapter]:
    """A LoRA as PEFT saves it: module path in the base model -> adapter."""
    config = read_json(directory / "adapter_config.json")
    more = [name for name in ("use_dora", "lora_bias", "modules_to_save") if config.get(name)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    need_plain(", ".join(more))
    tensors = read_tensors(weights_file(directory, "adapter_model"), (".lora_A.weight", ".lora_B.weight"))
    adapters = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            lora_A, lora_B = array(tensors[key]), array(tensors[key.replace(".lora_A.", ".lora_B.")])
            adapters[module] = Adapter(lora_A, lora_B, scaling_of(config, module, len(lora_A)))
    return adapters


def need_plain(more: str) -> None:
    """more: what experts have beside A, B and a scaling; "" for nothing."""
    if more:
        raise NotApplicable(f"the reference mixes sums of low-rank deltas, and these experts have more: {more}")


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732); alpha_pattern overrides by module suffix."""
    alpha = config["lora_alpha"]
    for suffix, override in (config.get("alpha_pattern") or {}).items():
        if module == suffix or module.endswith(f".{suffix}"):
            alpha = override
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def adapter_directory(path: Path, name: str) -> Path | None:
    """The directory that holds this expert in PEFT's own layout, at any depth below the checkpoint."""
    candidates = [path / "peft_adapters" / name / name, path / "peft_adapters" / name, path / name, path]
    return next((c for c in candidates if is_adapter(c)), None)


def is_adapter(directory: Path) -> bool:
    return all((directory / file).is_file() for file in ("adapter_config.json", "adapter_model.safetensors"))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
