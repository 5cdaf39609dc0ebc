"""One expert on disk, as stock PEFT saves a LoRA."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dylo_moe.errors import InvalidField
from dylo_moe.formats.checkpoint import Expert, LoraPair


def write_expert(directory: Path, expert: Expert, base_model: str | None) -> None:
    """One expert as stock PEFT saves a LoRA: adapter_config.json and adapter_model.safetensors in `directory`.

    Raises:
        InvalidField: rank-stabilised and plain scaling, or DoRA and plain LoRA, in one expert: one configuration cannot say both.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / "adapter_model.safetensors", _tensors(expert))
    write_json(directory / "adapter_config.json", _adapter_config(expert, base_model, directory))


def _tensors(expert: Expert) -> dict[str, Tensor]:
    """The tensors under PEFT's keys."""
    tensors = {}
    for module, pair in expert.modules.items():
        own = {"lora_A.weight": pair.lora_A, "lora_B.weight": pair.lora_B}
        own |= {"lora_magnitude_vector": pair.magnitude, "lora_B.bias": pair.bias}
        tensors |= {f"{module}.{name}": tensor for name, tensor in own.items() if tensor is not None}
    for module, parameters in expert.replaced.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in parameters.items()}
    for module, bias in expert.biases.items():
        tensors[f"{module}.base_layer.bias" if module in expert.modules else f"{module}.bias"] = bias
    return {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}


def _adapter_config(expert: Expert, base_model: str | None, directory: Path) -> dict[str, Any]:
    default, pairs = default_pair(expert), expert.modules.values()
    flags = {
        "use_rslora": {pair.use_rslora for pair in pairs},
        "use_dora": {pair.magnitude is not None for pair in pairs},
        "lora_bias": {pair.bias is not None for pair in pairs},
    }
    for name, found in flags.items():
        if len(found) > 1:
            raise InvalidField(directory, name, found="true and false in one expert", expected="one of them")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": default.rank,
        "lora_alpha": _plain(default.alpha),
        "lora_dropout": 0.0,
        **{name: found == {True} for name, found in flags.items()},
        "bias": _bias(expert),
        "modules_to_save": sorted(expert.replaced) or None,
        "fan_in_fan_out": False,
        "target_modules": list(expert.targets) or sorted(expert.modules),
        "rank_pattern": {_exactly(name): pair.rank for name, pair in expert.modules.items() if pair.rank != default.rank},
        "alpha_pattern": {
            _exactly(name): _plain(pair.alpha) for name, pair in expert.modules.items() if pair.alpha != default.alpha
        },
    }


def _bias(expert: Expert) -> str:
    if not expert.biases:
        return "none"
    return "lora_only" if set(expert.biases) <= set(expert.modules) else "all"


def default_pair(expert: Expert) -> LoraPair:
    """The pair whose rank and alpha are the most frequent, the first of them; the others go into patterns."""
    pairs = list(expert.modules.values())
    rank, alpha = Counter((pair.rank, pair.alpha) for pair in pairs).most_common(1)[0][0]
    return next(pair for pair in pairs if (pair.rank, pair.alpha) == (rank, alpha))


def _exactly(module: str) -> str:
    return re.escape(module)  # rank_pattern and alpha_pattern are regular expressions


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    own = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with torch.no_grad():
        save_file(own, path, metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
