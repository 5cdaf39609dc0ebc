"""Tiny checkpoints written by hand: hidden size 8, two layers, q_proj and v_proj."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = 8
LAYERS = 2
TARGETS = ("q_proj", "v_proj")
MODULES = tuple(f"model.layers.{layer}.self_attn.{target}" for layer in range(LAYERS) for target in TARGETS)


def pairs(rank: int = 4, *, seed: int = 0, modules: Sequence[str] = MODULES, suffix: str = "") -> dict[str, Tensor]:
    """PEFT's keys; `suffix` is the adapter's name inside the key (".expert_0") or nothing."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        start = f"base_model.model.{module}"
        tensors[f"{start}.lora_A{suffix}.weight"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"{start}.lora_B{suffix}.weight"] = torch.randn(HIDDEN, rank, generator=generator)
    return tensors


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(TARGETS),
        **changes,
    }


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def write_adapter(directory: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    write_json(directory / "adapter_config.json", config(**changes))
    save_file(pairs() if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


def gate(experts: int = 2, hidden: int = HIDDEN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "gate.weight": torch.randn(experts, hidden, generator=generator),
        "gate.bias": torch.randn(experts, generator=generator),
    }


def moe_config(experts: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "format": "dylo_moe",
        "format_version": 1,
        "base_model_name_or_path": "base",
        "num_experts": experts,
        "experts": [{"name": f"expert_{number}", "scaling": 2.0} for number in range(experts)],
        "router": {
            "type": "dynamic_hybrid",
            "features": "base",
            "hidden_size": HIDDEN,
            "top_k": 1,
            "temperature": 2.0,
        },
        "load_balance": {"load_balance_loss_type": "mse", "router_aux_loss_coef": 0.01},
        **changes,
    }


def native(directory: Path, experts: int = 2, **changes: Any) -> Path:
    write_json(directory / "moe_config.json", moe_config(experts, **changes))
    for number in range(experts):
        write_adapter(directory / "experts" / f"expert_{number}", pairs(seed=number))
    save_file(gate(experts), directory / "router.safetensors")
    return directory


def separated(directory: Path, experts: int = 2) -> Path:
    """D5: nested adapter directories, router.safetensors, minimal config.json."""
    for number in range(experts):
        name = f"expert_{number}"
        write_adapter(directory / "peft_adapters" / name / name, pairs(seed=number))
    save_file(gate(experts), directory / "router.safetensors")
    minimal = {"model_type": "dylora-moe", "base_model_name_or_path": "base", "num_experts": experts}
    write_json(directory / "config.json", minimal)
    return directory


def separated_pickles(directory: Path, experts: int = 2) -> Path:
    """D4: expert_K.pt, nested router.pt, lora_alpha in config.json."""
    (directory / "peft_adapters").mkdir(parents=True)
    (directory / "dylo_moe_state").mkdir()
    for number in range(experts):
        tensors = pairs(seed=number, suffix=f".expert_{number}")
        torch.save(tensors, directory / "peft_adapters" / f"expert_{number}.pt")
    torch.save(nested_router(experts), directory / "dylo_moe_state" / "router.pt")
    recorded = {"model_type": "dylora-moe", "_dylora_num_experts": experts, "_dylora_lora_r": 4, "_dylora_lora_alpha": 16}
    write_json(directory / "config.json", recorded)
    return directory


def nested_router(experts: int = 2) -> dict[str, Any]:
    tensors = gate(experts)
    return {
        "gate_state_dict": {"weight": tensors["gate.weight"], "bias": tensors["gate.bias"]},
        "num_experts": experts,
        "input_size": HIDDEN,
        "top_k": 2,
        "temperature": 3.0,
        "expert_maturity": torch.ones(experts),
    }


def full_state(experts: int = 2) -> dict[str, Tensor]:
    """D1 to D3: the state dict of the whole DyLoRA-MoE model."""
    generator = torch.Generator().manual_seed(9)
    state = {}
    for module in MODULES:
        key = f"foundation_model.base_model.model.{module}.base_layer.weight"
        state[key] = torch.randn(HIDDEN, HIDDEN, generator=generator)
    state["foundation_model.base_model.model.model.embed_tokens.weight"] = torch.randn(16, HIDDEN, generator=generator)
    for number in range(experts):
        tensors = pairs(seed=number, suffix=f".expert_{number}")
        state |= {f"foundation_model.{key}": tensor for key, tensor in tensors.items()}
    return state | {f"router.{key}": tensor for key, tensor in gate(experts).items()}


def base(directory: Path, layers: int = LAYERS, **changes: Any) -> Path:
    """A base model: only the tensors that matter here."""
    modules = [f"model.layers.{layer}.self_attn.{target}" for layer in range(layers) for target in TARGETS]
    weights = {f"{module}.weight": torch.ones(HIDDEN, HIDDEN) for module in modules}
    weights["model.embed_tokens.weight"] = torch.ones(16, HIDDEN)
    recorded = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "tie_word_embeddings": True,
        **changes,
    }
    write_json(directory / "config.json", recorded)
    save_file(weights, directory / "model.safetensors")
    return directory
