"""LoRA adapters as PEFT writes them, by hand: random experts for a base model on disk. No peft takes part."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STRENGTH = 0.25  # |scaling * B A| / |W| in Frobenius norm: experts change the logits clearly, and do not drown the base

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GPT2_ATTENTION = ("attn.c_attn", "attn.c_proj")
_TARGETS = {
    ("gated", "attention"): _ATTENTION,
    ("gated", "all-linear"): (*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
    ("gated", "lm_head"): ("lm_head",),
    ("gpt2", "attention"): _GPT2_ATTENTION,
    ("gpt2", "all-linear"): (*_GPT2_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
}


@dataclass(frozen=True)
class Base:
    """A base model on disk that `write_base` wrote."""

    path: Path
    config: dict
    weights: dict[str, Tensor]

    @property
    def is_gpt2(self) -> bool:
        return self.config["model_type"] == "gpt2"

    @property
    def hidden_size(self) -> int:
        return self.config["n_embd" if self.is_gpt2 else "hidden_size"]

    def targets(self, which: str) -> tuple[str, ...]:
        kind = "gpt2" if self.is_gpt2 else "gated"
        if (kind, which) not in _TARGETS or (which == "lm_head" and "lm_head.weight" not in self.weights):
            raise ValueError(f"a {self.config['model_type']} specimen has no targets {which!r}")
        return _TARGETS[kind, which]


@dataclass(frozen=True)
class Lora:
    """The choices that one expert's adapter_config.json records."""

    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def read_base(path: Path) -> Base:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Base(path.resolve(), config, load_file(path / "model.safetensors"))


def expert_tensors(base: Base, lora: Lora, *, index: int | str, seed: int) -> dict[str, Tensor]:
    """lora_A (rank, in) and lora_B (out, rank) of every targeted module, under PEFT's names, in float64."""
    tensors = {}
    for module in _targeted(base, lora.targets):
        weight = base.weights[f"{module}.weight"].double()
        inputs, outputs = weight.shape if base.is_gpt2 else weight.shape[::-1]
        down = draw((lora.rank, inputs), seed, f"{index}.{module}.A") / inputs**0.5
        up = draw((outputs, lora.rank), seed, f"{index}.{module}.B")
        size = STRENGTH * weight.norm() / (lora.scaling * (up @ down).norm())
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up * size
    return tensors


def _targeted(base: Base, targets: tuple[str, ...]) -> list[str]:
    suffixes = tuple(f".{target}" for target in targets)
    modules = [name.removesuffix(".weight") for name in base.weights if name.endswith(".weight")]
    return sorted(module for module in modules if f".{module}".endswith(suffixes))


def draw(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Standard normal numbers that depend on the seed and the name alone."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(generator.standard_normal(shape))


def cast(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def write_adapter(directory: Path, base: Base, lora: Lora, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path),
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "use_rslora": lora.use_rslora,
            "target_modules": sorted(lora.targets),
            "fan_in_fan_out": base.is_gpt2,
            "lora_dropout": 0.0,
            "bias": "none",
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
            "inference_mode": True,
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
