"""The native layout: moe_config.json, experts/<name>/ and shared/ in PEFT's own layout, router.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.artifact import Artifact
from harness.oracles.gates import Rule
from harness.oracles.xlora import Scaling
from harness.readings.files import array, read_json, read_peft_adapter, read_tensors
from harness.routers import Classifier, HybridGate, Router, UnitGate, UnitGates


def read(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    config = read_json(path / "moe_config.json")
    names = tuple(expert["name"] for expert in config["experts"])
    directories = tuple(path / "experts" / name for name in names)
    section = config["router"]
    by_network = section is not None and section.get("level") == "feed_forward"
    return Artifact(
        path=path,
        base=base_model or config["base_model_name_or_path"],
        names=names,
        experts=tuple(read_peft_adapter(directory) for directory in directories),
        router=None if section is None else _router(path, section, len(names)),
        balance=config.get("load_balance", {}),
        adapter_directories=directories,
        reader="",
        shared=read_peft_adapter(path / "shared") if config.get("shared") else {},
        feed_forwards=tuple(gate["unit"] for gate in section["gates"]) if by_network else (),
    )


def _router(path: Path, section: Mapping[str, Any], count: int) -> Router:
    tensors = read_tensors(path / "router.safetensors")
    return _READERS[section["type"]](section, tensors, count)


def _hybrid(section: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> HybridGate:
    gate = array(tensors["gate.weight"])
    return HybridGate(gate, _optional(tensors, "gate.bias"), section["features"], section["top_k"], section["temperature"])


def _classifier(section: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> Classifier:
    names = [f"classifier.layers.{index}" for index in range(len(section["layers"]))]
    scaling = Scaling(
        count,
        section["num_layers"],
        layerwise=section["layerwise"],
        softmax=section["enable_softmax"],
        softmax_topk=section["enable_softmax_topk"],
        over_batch=section.get("softmax_topk") == "batch",
        temperature=section["softmax_temperature"],
        top_k=section["top_k"],
        global_weight=section["global_scaling_weight"],
    )
    layers = tuple((array(tensors[f"{name}.weight"]), _optional(tensors, f"{name}.bias")) for name in names)
    return Classifier(layers, scaling, relu=section["use_relu"], dropout=section["dropout"])


def _gates(section: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> UnitGates:
    gates = {}
    for recorded in section["gates"]:
        start = f"gates.{recorded['unit']}"
        rule = Rule(
            section["rule"],
            recorded["top_k"],
            section["temperature"],
            section["threshold"],
            section.get("mixlora_switch"),
            section.get("expert_capacity"),
        )
        threshold = _optional(tensors, f"{start}.threshold_weight")
        gates[recorded["unit"]] = UnitGate(
            array(tensors[f"{start}.weight"]),
            rule,
            count,
            _optional(tensors, f"{start}.bias"),
            None if threshold is None else (threshold, _optional(tensors, f"{start}.threshold_bias")),
        )
    return UnitGates(gates, trained=section["rule"] != "arrow")


def _optional(tensors: Mapping[str, Tensor], name: str) -> Any:
    return array(tensors[name]) if name in tensors else None


_READERS = {"dynamic_hybrid": _hybrid, "xlora": _classifier, "gates": _gates}
