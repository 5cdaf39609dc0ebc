"""Changed copies of the checkpoint under judgement, in the native layout, for the laws that compare two checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from harness.artifact import Adapter, Artifact, Expert
from harness.routers import Classifier, HybridGate, Router, UnitGate, UnitGates


def write_variant(
    directory: Path, artifact: Artifact, *, experts: Sequence[Mapping[str, Adapter]], router: Router | None, transposed: bool
) -> Path:
    """A native checkpoint of these experts, named expert_0, expert_1, ... in this order, and this router; returns `directory`.

    transposed: the base model's Linears store their weights as (in, out), as GPT-2's do.
    """
    names = [f"expert_{index}" for index in range(len(experts))]
    for name, expert in zip(names, experts, strict=True):
        _write_expert(directory / "experts" / name, expert, artifact.base, transposed=transposed)
    if artifact.shared:
        _write_expert(directory / "shared", artifact.shared, artifact.base, transposed=transposed)
    section, tensors = _router(router, artifact)
    if tensors:
        stored = {name: torch.from_numpy(values).float().contiguous() for name, values in tensors.items() if values is not None}
        save_file(stored, directory / "router.safetensors", metadata={"format": "pt"})
    recorded = {
        "format": "dylo_moe",
        "format_version": 1,
        "base_model_name_or_path": artifact.base,
        "num_experts": len(experts),
        "experts": [_entry(name, expert) for name, expert in zip(names, experts, strict=True)],
        **({"shared": _entry("always_on", artifact.shared)} if artifact.shared else {}),
        "router": section,
        "load_balance": {"load_balance_loss_type": artifact.balance_kind, "router_aux_loss_coef": 0.01, **artifact.balance},
    }
    _write_json(directory / "moe_config.json", recorded)
    return directory


def _entry(name: str, expert: Mapping[str, Adapter]) -> dict[str, object]:
    return {"name": name, "scaling": next(iter(expert.values())).scaling}


def _write_expert(directory: Path, expert: Mapping[str, Adapter], base: str | None, *, transposed: bool) -> None:
    directory.mkdir(parents=True)
    first = next(iter(expert.values()))
    rank, tensors = len(first.lora_A), {}
    for module, adapter in expert.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.from_numpy(adapter.lora_A).float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.from_numpy(adapter.lora_B).float().contiguous()
        more = {"lora_magnitude_vector": adapter.magnitude, "lora_B.bias": adapter.bias}
        tensors |= {f"base_model.model.{module}.{part}": stored(values) for part, values in more.items() if values is not None}
    beside = expert if isinstance(expert, Expert) else Expert(expert)
    for module, parameters in beside.replaced.items():
        tensors |= {f"base_model.model.{module}.{part}": stored(values) for part, values in parameters.items()}
    for module, bias in beside.biases.items():
        tensors[f"base_model.model.{module}{'.base_layer' if module in expert else ''}.bias"] = stored(bias)
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
        "lora_dropout": 0.25,  # which eval() has to switch off: variants are never trained
        "bias": "all" if beside.biases else "none",
        "modules_to_save": sorted(beside.replaced) or None,
        "use_dora": any(adapter.magnitude is not None for adapter in expert.values()),
        "lora_bias": any(adapter.bias is not None for adapter in expert.values()),
    }
    _write_json(directory / "adapter_config.json", config)


def stored(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).float()


Tensors = dict[str, "np.ndarray | None"]


def _router(router: Router | None, artifact: Artifact) -> tuple[dict[str, object] | None, Tensors]:
    """What moe_config.json says of a router, and the tensors of router.safetensors."""
    if router is None:
        return None, {}
    if isinstance(router, HybridGate):
        return _hybrid(router)
    return _classifier(router) if isinstance(router, Classifier) else _gates(router, artifact)


def _hybrid(gate: HybridGate) -> tuple[dict[str, object], Tensors]:
    section = {
        "type": "dynamic_hybrid",
        "features": gate.features,
        "hidden_size": gate.weight.shape[1],
        "top_k": gate.top_k,
        "temperature": gate.temperature,
    }
    return section, {"gate.weight": gate.weight, "gate.bias": gate.bias}


def _classifier(router: Classifier) -> tuple[dict[str, object], Tensors]:
    how, tensors = router.scaling, {}
    for index, (weight, bias) in enumerate(router.layers):
        tensors |= {f"classifier.layers.{index}.weight": weight, f"classifier.layers.{index}.bias": bias}
    section = {
        "type": "xlora",
        "features": router.features,
        "layers": [{"inputs": w.shape[1], "outputs": w.shape[0], "bias": bias is not None} for w, bias in router.layers],
        "layerwise": how.layerwise,
        "enable_softmax": how.softmax,
        "enable_softmax_topk": how.softmax_topk,
        "softmax_topk": "batch" if how.over_batch else "token",
        "use_relu": router.relu,
        "num_layers": how.num_layers,
        "softmax_temperature": how.temperature,
        "top_k": how.top_k,
        "global_scaling_weight": how.global_weight,
        "dropout": router.dropout,
    }
    return section, tensors


def _gates(router: UnitGates, artifact: Artifact) -> tuple[dict[str, object], Tensors]:
    tensors: Tensors = {}
    for unit, gate in router.gates.items():
        second = gate.threshold or (None, None)
        stored = {"weight": gate.weight if gate.published is None else gate.published, "bias": gate.bias}
        stored |= {"threshold_weight": second[0], "threshold_bias": second[1]}
        tensors |= {f"gates.{unit}.{part}": values for part, values in stored.items()}
    first = next(iter(router.gates.values())).rule
    section = {
        "type": "gates",
        "features": router.features,
        "level": "feed_forward" if artifact.feed_forwards else "linear",
        "rule": first.name,
        "temperature": first.temperature,
        "threshold": first.threshold,
        "mixlora_switch": first.mixlora_switch,
        "expert_capacity": first.expert_capacity,
        "gates": [_gate_entry(unit, gate) for unit, gate in router.gates.items()],
    }
    return section, tensors


def _gate_entry(unit: str, gate: UnitGate) -> dict[str, object]:
    second = None if gate.threshold is None else "weight" if gate.threshold[1] is None else "weight and bias"
    experts, inputs = gate.weight.shape
    common = {"unit": unit, "experts": experts, "inputs": inputs, "top_k": gate.rule.top_k}
    return {**common, "bias": gate.bias is not None, "threshold_gate": second}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
