"""adapter_config.json of the research forks of PEFT whose LoRAs have gates: LoRAMoE, HydraLoRA, MoLA, AdaMoLE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylo_moe.errors import InvalidField
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text, parse_alpha, parse_rank
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions

# Fields of these forks that change what is computed in a way that is not read; only these values are allowed.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "enable_lora": (None,),
    "task_type": (None, "CAUSAL_LM"),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}
_LORA = "adapter_config.json"


@dataclass(frozen=True)
class GatedConfig:
    """The validated fields. rank: one for all layers, or one per layer of the base model (MoLA)."""

    file: Path
    data: Mapping[str, Any]
    rank: int | tuple[int, ...]
    alpha: float
    targets: tuple[str, ...] | str
    layers: frozenset[int] | None
    base_model: str | None

    @property
    def adapter(self) -> AdapterConfig:
        """The part that each expert needs; a rank per layer is compared with the tensors elsewhere."""
        rank = self.rank if isinstance(self.rank, int) else None
        return AdapterConfig(self.file, rank, self.alpha, targets=self.targets, layers=self.layers)


def read_gated_config(files: CheckpointFiles, options: ReadOptions, *, rank: str = "r", per_layer: bool = False) -> GatedConfig:
    """Read and validate adapter_config.json at the root; `rank` is the name of its field, `per_layer` whether it may be a list.

    Raises:
        InvalidField: a field has a wrong type or an impossible value, asks for what is not supported, or lacks the alpha.
    """
    path = files.root / _LORA
    data = files.read_json(path)
    for name, allowed in _UNSUPPORTED.items():
        if not any(type(data.get(name)) is type(value) and data.get(name) == value for value in allowed):
            raise InvalidField(path, name, found=repr(data[name])[:80], expected=f"{allowed[-1]!r}: others are not supported")
    return GatedConfig(
        file=path,
        data=data,
        rank=_rank(data.get(rank), path, rank, per_layer=per_layer),
        alpha=_alpha(data.get("lora_alpha"), options, path, files),
        targets=_targets(data.get("target_modules"), path),
        layers=_layers(data.get("layers_to_transform"), path),
        base_model=optional_text(data.get("base_model_name_or_path"), path, "base_model_name_or_path"),
    )


def _rank(value: object, path: Path, name: str, *, per_layer: bool) -> int | tuple[int, ...]:
    if per_layer and isinstance(value, list) and value:
        return tuple(parse_rank(each, path, name) for each in value)
    return parse_rank(value, path, name)


def _alpha(value: object, options: ReadOptions, path: Path, files: CheckpointFiles) -> float:
    if value is None and options.lora_alpha is None:
        raise InvalidField(path, "lora_alpha", found="nothing", expected="the experts' alpha; pass lora_alpha=")
    return parse_alpha(value if value is not None else options.lora_alpha, path, "lora_alpha", files)


def _targets(value: object, path: Path) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise InvalidField(path, "target_modules", found=repr(value)[:80], expected="a list of module names or a pattern")
    return tuple(value)


def _layers(value: object, path: Path) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    items = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in items):
        raise InvalidField(path, "layers_to_transform", found=repr(value)[:80], expected="layer numbers")
    return frozenset(items)
