"""Changed copies of the checkpoint under judgement, in the native layout, for the laws that compare two checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from harness.artifact import Adapter, Artifact, Gate


def write_variant(
    directory: Path, artifact: Artifact, *, experts: Sequence[Mapping[str, Adapter]], gate: Gate | None, transposed: bool
) -> Path:
    """A native checkpoint of these experts, named expert_0, expert_1, ... in this order, and this gate; returns `directory`.

    transposed: the base model's Linears store their weights as (in, out), as GPT-2's do.
    """
    names = [f"expert_{index}" for index in range(len(experts))]
    for name, expert in zip(names, experts, strict=True):
        _write_expert(directory / "experts" / name, expert, artifact.base, transposed=transposed)
    if gate is not None:
        tensors = {"gate.weight": torch.from_numpy(gate.weight).float()}
        if gate.bias is not None:
            tensors["gate.bias"] = torch.from_numpy(gate.bias).float()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "router.safetensors")
    recorded = {
        "format": "dylo_moe",
        "format_version": 1,
        "base_model_name_or_path": artifact.base,
        "num_experts": len(experts),
        "experts": [
            {"name": name, "scaling": next(iter(expert.values())).scaling} for name, expert in zip(names, experts, strict=True)
        ],
        "router": None if gate is None else _router(gate),
        "load_balance": dict(artifact.balance) or {"load_balance_loss_type": "mse", "router_aux_loss_coef": 0.01},
    }
    _write_json(directory / "moe_config.json", recorded)
    return directory


def _write_expert(directory: Path, expert: Mapping[str, Adapter], base: str | None, *, transposed: bool) -> None:
    directory.mkdir(parents=True)
    first = next(iter(expert.values()))
    rank, tensors = len(first.lora_A), {}
    for module, adapter in expert.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.from_numpy(adapter.lora_A).float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.from_numpy(adapter.lora_B).float().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "rank_pattern": {re.escape(m): len(a.lora_A) for m, a in expert.items() if len(a.lora_A) != rank},
        "alpha_pattern": {
            re.escape(m): a.scaling * len(a.lora_A)
            for m, a in expert.items()
            if a.scaling * len(a.lora_A) != first.scaling * rank
        },
        "target_modules": sorted(expert),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    _write_json(directory / "adapter_config.json", config)


def _router(gate: Gate) -> dict[str, object]:
    return {
        "type": "dynamic_hybrid",
        "features": gate.features,
        "hidden_size": gate.weight.shape[1],
        "top_k": gate.top_k,
        "temperature": gate.temperature,
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
