"""HydraLoRA (arXiv 2404.19245): one A for all experts of a Linear, a B for each, a dense softmax gate on the Linear's input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.artifact import Adapter, Artifact
from harness.oracles.gates import Rule
from harness.readings.files import PREFIX, array, read_json, read_tensors, scaling_of, weights_file
from harness.routers import UnitGate, UnitGates

ROUTE = ".lora_route.weight"


def read(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    config = read_json(path / "adapter_config.json")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(weights_file(path, "adapter_model")).items()}
    gates = {name.removesuffix(ROUTE): array(tensors[name]) for name in tensors if name.endswith(ROUTE)}
    count = len(next(iter(gates.values())))
    experts = []
    for expert in range(count):
        pairs = {m: (array(tensors[f"{m}.lora_A.weight"]), array(tensors[f"{m}.lora_B{expert}.weight"])) for m in gates}
        experts.append({m: Adapter(a, b, scaling_of(config, m, len(a))) for m, (a, b) in pairs.items()})
    return Artifact(
        path=path,
        base=base_model or config["base_model_name_or_path"],
        names=tuple(f"expert_{index}" for index in range(count)),
        experts=tuple(experts),
        router=UnitGates({module: UnitGate(gate, Rule("softmax"), count) for module, gate in gates.items()}),
        balance={},
        adapter_directories=tuple(None for _ in experts),
        reader="",
    )
