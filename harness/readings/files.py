"""Tensors of a checkpoint's files, and the adapters that PEFT's own layout holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.artifact import Adapter, Expert
from harness.outcome import NotApplicable

PREFIX = "base_model.model."
# Base weights that PEFT saves beside an adapted readout or embedding. They must be the base's own, so nobody needs them.
_REPEATED = ("lm_head.base_layer.weight", "embed_tokens.base_layer.weight")


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


def read_peft_adapter(directory: Path) -> Expert:
    """A LoRA as PEFT saves it: module path in the base model -> adapter, and what is saved beside the adapters."""
    config = read_json(directory / "adapter_config.json")
    tensors = read_tensors(weights_file(directory, "adapter_model"))
    keys, expert = beside(config, tensors)
    for key, module in keys.items():
        part = module.partition(".lora_")[2]
        if part not in ("A.weight", "B.weight", "B.bias", "magnitude_vector", "magnitude_vector.weight"):
            raise ValueError(f"{directory}: {key}: found a foreign tensor, expected lora_A, lora_B and what belongs to them")
        if part == "A.weight":
            path = module.removesuffix(".lora_A.weight")
            expert[path] = _adapter(path, config, {name: tensors[key] for key, name in keys.items()})
    return expert


def _adapter(module: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """tensors: by name, without PEFT's prefix."""
    lora_A, lora_B = (array(tensors[f"{module}.lora_{part}.weight"]) for part in "AB")
    start = f"{module}.lora_magnitude_vector"
    magnitude = tensors.get(start, tensors.get(f"{start}.weight"))
    bias = tensors.get(f"{module}.lora_B.bias")
    return Adapter(
        lora_A,
        lora_B,
        scaling_of(config, module, len(lora_A)),
        None if magnitude is None else array(magnitude).reshape(-1),
        None if bias is None else array(bias),
    )


def beside(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], Expert]:
    """Key -> name without PEFT's prefix of what belongs to adapters; and an Expert with what does not: whole modules, biases."""
    adapters: dict[str, str] = {}
    expert = Expert({})
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        module = saved_module(name, config.get("modules_to_save") or ())
        if module is not None:
            parameter = name.removeprefix(f"{module}.").removeprefix("modules_to_save.")
            expert.replaced.setdefault(module, {})[parameter] = array(tensor)
        elif name.endswith(_REPEATED):
            continue
        elif ".lora_" not in name and name.endswith(".bias") and config.get("bias", "none") != "none":
            expert.biases[name.removesuffix(".bias").removesuffix(".base_layer")] = array(tensor)
        else:
            adapters[key] = name
    return adapters, expert


def saved_module(name: str, saved: Sequence[str]) -> str | None:
    """The outermost module around this parameter whose path ends as PEFT's modules_to_save has it."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((path for path in paths if any(path.endswith(ending) for ending in saved)), None)


def need_plain(more: str) -> None:
    """more: what experts have beside A, B and a scaling; "" for nothing."""
    if more:
        raise NotApplicable(f"in this layout the judge knows sums of low-rank deltas, and these experts have more: {more}")


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
