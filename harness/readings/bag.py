"""One LoRA or AdaLoRA directory of PEFT, and a bag: several of them side by side, without a router.

AdaLoRA (arXiv 2303.10512) as PEFT computes it: delta(x) = B diag(E) A x * scaling / (init_r + 1e-5), where scaling is lora_alpha,
or the module's rank where lora_alpha is not above 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.artifact import Adapter, Artifact, Expert
from harness.readings.files import array, beside, read_json, read_peft_adapter, read_tensors, weights_file

_EPSILON = 1e-5


def read_one(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    """The adapter at the root, which PEFT calls "default"."""
    return _read(path, {"default": path}, base_model)


def read_bag(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    """One expert per subdirectory; digits in names count as numbers, so that expert_10 follows expert_9."""
    found = [file.parent for file in path.glob("*/adapter_config.json")]
    return _read(path, {directory.name: directory for directory in sorted(found, key=_by_number)}, base_model)


def _by_number(directory: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", directory.name)]


def _read(path: Path, directories: Mapping[str, Path], base_model: str | None) -> Artifact:
    recorded = read_json(next(iter(directories.values())) / "adapter_config.json").get("base_model_name_or_path")
    return Artifact(
        path=path,
        base=base_model or recorded,
        names=tuple(directories),
        experts=tuple(_expert(directory) for directory in directories.values()),
        router=None,
        balance={},
        adapter_directories=tuple(directories.values()),
        reader="",
    )


def _expert(directory: Path) -> Expert:
    is_adalora = read_json(directory / "adapter_config.json").get("peft_type") == "ADALORA"
    return read_adalora(directory) if is_adalora else read_peft_adapter(directory)


def read_adalora(directory: Path) -> Expert:
    """Modules that were pruned to rank 0 have no adapter."""
    config = read_json(directory / "adapter_config.json")
    tensors = read_tensors(weights_file(directory, "adapter_model"))
    keys, expert = beside(config, tensors)
    own = {name: array(tensors[key]) for key, name in keys.items()}
    for module in [name.removesuffix(".lora_E") for name in own if name.endswith(".lora_E")]:
        lora_A, lora_B, values = (own[f"{module}.lora_{part}"] for part in "ABE")
        scale = config["lora_alpha"] if config["lora_alpha"] > 0 else float(len(values))
        if len(values):
            expert[module] = Adapter(values * lora_A, lora_B, scale / (config["init_r"] + _EPSILON))
    return expert
