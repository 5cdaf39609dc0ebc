"""What the judge itself reads from a checkpoint: float64 arrays, by its own reading of the layouts that it knows.

r rank, I inputs, O outputs, E experts, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

OWN_READING = "the judge's own reading of the files"
SUBJECTS_READER = "dylo_moe.read_checkpoint: this layout has no second reader, so its reading is not judged"


@dataclass(frozen=True)
class Adapter:
    """One expert on one Linear: delta(x) = scaling * B (A x); lora_A (r, I), lora_B (O, r), float64."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    scaling: float


@dataclass(frozen=True)
class Gate:
    """The router: weight (E, H), bias (E,) or None, float64."""

    weight: np.ndarray
    bias: np.ndarray | None
    features: str
    top_k: int
    temperature: float


@dataclass(frozen=True)
class Artifact:
    """A checkpoint as the judge understands it.

    experts[e] maps a module's path in the base model to its Adapter; names[e] is the expert's name;
    adapter_directories[e] is where stock PEFT finds it, None where the layout has no such directory.
    reader says who read the files.
    """

    path: Path
    base: str | None
    names: tuple[str, ...]
    experts: tuple[Mapping[str, Adapter], ...]
    gate: Gate | None
    balance: Mapping[str, Any]
    adapter_directories: tuple[Path | None, ...]
    reader: str
    base_config: Mapping[str, Any] | None = None
    base_state: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the routed modules, sorted."""
        return tuple(sorted({module for expert in self.experts for module in expert}))


def read_artifact(path: Path, base_model: str | None = None, assume: Mapping[str, Any] | None = None) -> Artifact:
    """assume: what no file of a foreign layout records: lora_alpha, top_k, temperature, router_features.

    Raises whatever the file system, json or safetensors raise: the subject is asked first, and refuses by name.
    """
    path = Path(path)
    native = (path / "moe_config.json").is_file()
    return _native(path, base_model) if native else _foreign(path, base_model, dict(assume or {}))


def load_base(artifact: Artifact, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The base model alone, through transformers, in eval mode. attention: "eager", "sdpa" or None for the default."""
    options = {} if attention is None else {"attn_implementation": attention}
    config = _base_config(artifact)
    if artifact.base_state is not None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in artifact.base_state.items()}, strict=False)
        model.tie_weights()
    else:
        model = AutoModelForCausalLM.from_pretrained(artifact.base, config=config, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def _base_config(artifact: Artifact) -> PreTrainedConfig:
    """The checkpoint's own copy of the base's configuration, or the base's; upstream renames its model_type."""
    recorded = artifact.base_config or {}
    types = [recorded.get("model_type"), recorded.get("_dylora_original_type")]
    known = next((name for name in types if name in CONFIG_MAPPING), None)
    if known is None:
        return AutoConfig.from_pretrained(artifact.base)
    fields = {name: value for name, value in recorded.items() if not name.startswith("_") and name != "model_type"}
    return AutoConfig.for_model(known, **fields)


def _native(path: Path, base_model: str | None) -> Artifact:
    config = json.loads((path / "moe_config.json").read_text(encoding="utf-8"))
    names = tuple(expert["name"] for expert in config["experts"])
    directories = tuple(path / "experts" / name for name in names)
    return Artifact(
        path=path,
        base=base_model or config["base_model_name_or_path"],
        names=names,
        experts=tuple(_peft_adapter(directory) for directory in directories),
        gate=_native_gate(path, config["router"]),
        balance=config.get("load_balance", {}),
        adapter_directories=directories,
        reader=OWN_READING,
    )


def _peft_adapter(directory: Path) -> dict[str, Adapter]:
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = _read(directory / "adapter_model.safetensors", (".lora_A.weight", ".lora_B.weight"))
    adapters = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_A, lora_B = _array(tensors[key]), _array(tensors[key.replace(".lora_A.", ".lora_B.")])
            adapters[module] = Adapter(lora_A, lora_B, _scaling(config, module, len(lora_A)))
    return adapters


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732); alpha_pattern overrides by module suffix."""
    alpha = config["lora_alpha"]
    for suffix, override in config.get("alpha_pattern", {}).items():
        if module == suffix or module.endswith(f".{suffix}"):
            alpha = override
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _native_gate(path: Path, router: Mapping[str, Any] | None) -> Gate | None:
    if router is None:
        return None
    tensors = _read(path / "router.safetensors", ("gate.weight", "gate.bias"))
    bias = tensors.get("gate.bias")
    return Gate(
        _array(tensors["gate.weight"]),
        None if bias is None else _array(bias),
        router["features"],
        router["top_k"],
        router["temperature"],
    )


def _foreign(path: Path, base_model: str | None, assume: dict[str, Any]) -> Artifact:
    from dylo_moe import read_checkpoint

    checkpoint = read_checkpoint(path, **assume)
    experts = tuple(
        {name: Adapter(_array(p.lora_A), _array(p.lora_B), p.scaling) for name, p in expert.modules.items()}
        for expert in checkpoint.experts
    )
    return Artifact(
        path=path,
        base=str(path) if checkpoint.format == "merged" else base_model or checkpoint.base_model,
        names=tuple(expert.name for expert in checkpoint.experts),
        experts=experts,
        gate=_foreign_gate(checkpoint.router),
        balance=checkpoint.load_balance,
        adapter_directories=tuple(_adapter_directory(path, expert.name) for expert in checkpoint.experts),
        reader=SUBJECTS_READER,
        base_config=checkpoint.base_config,
        base_state=checkpoint.base_state,
    )


def _foreign_gate(router: Any) -> Gate | None:
    if router is None:
        return None
    bias = None if router.bias is None else _array(router.bias)
    return Gate(_array(router.weight), bias, router.features, router.top_k, router.temperature)


def _adapter_directory(path: Path, name: str) -> Path | None:
    """The directory that holds this expert in PEFT's own layout, at any depth below the checkpoint."""
    candidates = [path / "peft_adapters" / name / name, path / "peft_adapters" / name, path / name, path]
    files = ("adapter_config.json", "adapter_model.safetensors")
    return next((c for c in candidates if all((c / file).is_file() for file in files)), None)


def _read(file: Path, expected: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors by name. Raises ValueError for a name that does not end in one of `expected`, and for NaN or infinity."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if not name.endswith(expected):
            raise ValueError(f"{file}: {name}: found a foreign tensor, expected names ending in {' or '.join(expected)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name}: found NaN or infinity, expected finite numbers")
    return tensors


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
