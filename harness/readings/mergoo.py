"""mergoo's LoRA mixtures: one model file holds base, experts and gates; config.json lists the experts' LoRA configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.artifact import Adapter, Artifact
from harness.oracles.gates import Rule
from harness.readings.files import array, read_json, read_tensors, scaling_of, weights_file
from harness.routers import UnitGate, UnitGates


def read(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    config = read_json(path / "config.json")
    tensors = _tensors(path)
    loras = config["adapter_configs"]
    experts = tuple(_expert(tensors, index, lora) for index, lora in enumerate(loras))
    top_k = assume.get("top_k") or config["num_experts_per_tok"]
    modules = [name.removesuffix(".gate.weight") for name in tensors if name.endswith(".gate.weight")]
    gates = {m: UnitGate(array(tensors[f"{m}.gate.weight"]), Rule("topk_softmax", top_k=top_k), len(loras)) for m in modules}
    return Artifact(
        path=path,
        base=base_model or loras[0].get("base_model_name_or_path"),
        names=tuple(f"expert_{index}" for index in range(len(loras))),
        experts=experts,
        router=UnitGates(gates),
        balance={},
        adapter_directories=tuple(None for _ in loras),
        reader="",
        base_config=config,
        base_state={name.replace(".base_layer.", "."): t for name, t in tensors.items() if not _is_added(name)},
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    indices = sorted(path.glob("*.index.json"))
    if not indices:
        return read_tensors(weights_file(path, "model", "pytorch_model"))
    shards = sorted(set(read_json(indices[0])["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in read_tensors(path / shard).items()}


def _expert(tensors: Mapping[str, Tensor], index: int, config: Mapping[str, Any]) -> dict[str, Adapter]:
    suffix = f".lora_A.{index}.weight"
    found = {}
    for name in tensors:
        if name.endswith(suffix):
            module, lora_A = name.removesuffix(suffix), array(tensors[name])
            lora_B = array(tensors[name.replace(".lora_A.", ".lora_B.")])
            found[module] = Adapter(lora_A, lora_B, scaling_of(config, module, len(lora_A)))
    return found


def _is_added(name: str) -> bool:
    return re.search(r"\.lora_[AB]\.\d+\.|\.gate\.weight$", name) is not None
