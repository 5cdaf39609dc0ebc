"""Arrow as PEFT saves it (create_arrow_model, then save_pretrained): task_0/, task_1/, ... and arrow_router/, which holds no
weights of use. Prototypes are computed: 15 steps of power iteration from one seeded draw per input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.artifact import Adapter, Artifact
from harness.oracles.gates import Rule, prototype
from harness.readings.files import read_json, read_peft_adapter
from harness.routers import UnitGate, UnitGates

STEPS = 15
EPSILON = 1e-8


def read(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    recorded = read_json(path / "arrow_router" / "adapter_config.json")
    how = recorded["arrow_config"]
    names = tuple(how.get("task_adapter_names") or sorted(_tasks(path), key=lambda name: int(name.rpartition("_")[2])))
    experts = tuple(read_peft_adapter(path / name) for name in names)
    seed = how["rng_seed"] if how.get("rng_seed") is not None else assume["rng_seed"]
    rule = Rule("arrow", top_k=how["top_k"], temperature=how["router_temperature"])
    task = read_json(path / names[0] / "adapter_config.json")
    base = recorded.get("base_model_name_or_path") or task["base_model_name_or_path"]
    return Artifact(
        path=path,
        base=base_model or base,
        names=names,
        experts=experts,
        router=UnitGates({module: _gate([e[module] for e in experts], rule, int(seed)) for module in experts[0]}, trained=False),
        balance={},
        adapter_directories=tuple(path / name for name in names),
        reader="",
    )


def is_plain(path: Path) -> bool:
    """Without GenKnowSub, whose subtraction may or may not be in the files already."""
    return not read_json(path / "arrow_router" / "adapter_config.json")["arrow_config"].get("use_gks")


def _tasks(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.startswith("task_")]


def _gate(adapters: list[Adapter], rule: Rule, seed: int) -> UnitGate:
    start = torch.randn(adapters[0].lora_A.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    exact = np.stack([prototype(a.lora_A, a.lora_B, start.double().numpy(), STEPS) for a in adapters])
    published = np.stack([_published(a, start) for a in adapters])
    return UnitGate(exact, rule, len(adapters), published=published)


def _published(adapter: Adapter, start: torch.Tensor) -> np.ndarray:
    """The same in float32, as PEFT iterates."""
    lora_A, lora_B = (torch.from_numpy(part).float() for part in (adapter.lora_A, adapter.lora_B))
    gram = lora_B.T @ lora_B
    vector = start / (start.norm() + EPSILON)
    for _ in range(STEPS):
        vector = lora_A.T @ (gram @ (lora_A @ vector))
        vector = vector / (vector.norm() + EPSILON)
    return vector.double().numpy()
