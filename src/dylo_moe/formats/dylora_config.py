"""config.json of a DyLoRA-MoE directory: the same four facts under the names that its releases have used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylo_moe.errors import InvalidField
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text, parse_alpha, parse_rank
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import require_integer

MAX_EXPERTS = 4_096
_BASE_FIELDS = ("base_model_name_or_path", "model_name", "_name_or_path")


@dataclass(frozen=True)
class DyloraConfig:
    """What the configuration records; None where it does not. `data` is the whole of config.json."""

    file: Path
    data: dict[str, Any]
    num_experts: int | None = None
    rank: int | None = None
    alpha: float | None = None
    base_model: str | None = None

    @property
    def base_config(self) -> dict[str, Any] | None:
        """The base model's configuration, where it was copied into config.json."""
        if "hidden_size" not in self.data and "n_embd" not in self.data:
            return None
        config = {key: value for key, value in self.data.items() if not key.startswith("_dylora")}
        original = self.data.get("_dylora_original_type")
        if config.get("model_type") in (None, "dylora-moe"):
            config.pop("model_type", None)
            if isinstance(original, str) and original != "dylora-moe":
                config["model_type"] = original
        return config


def is_dylora_config(data: dict[str, Any]) -> bool:
    """Whether a config.json carries DyLoRA-MoE's marks."""
    return data.get("model_type") == "dylora-moe" or any(key.startswith("_dylora_") for key in data)


def read_dylora_config(files: CheckpointFiles) -> DyloraConfig:
    """config.json, and dylo_moe_state/config.json for what it lacks; both may be absent.

    Raises:
        InvalidField: num_experts, lora_r or lora_alpha is not a possible value.
    """
    path, planned = files.root / "config.json", files.root / "dylo_moe_state" / "config.json"
    data = files.read_json(path) if files.exists(path) else {}
    extra = files.read_json(planned) if files.exists(planned) else {}
    recorded = {**extra, **data}
    names = {name: _field(recorded, name) for name in ("num_experts", "lora_r", "lora_alpha")}
    values = {name: recorded.get(field) for name, field in names.items()}
    return DyloraConfig(
        file=path,
        data=data,
        num_experts=_optional(values["num_experts"], path, names["num_experts"]),
        rank=None if values["lora_r"] is None else parse_rank(values["lora_r"], path, names["lora_r"]),
        alpha=_alpha(values["lora_alpha"], path, names["lora_alpha"], files),
        base_model=_base_model(recorded, path),
    )


def adapter_config(config: DyloraConfig, options: ReadOptions, files: CheckpointFiles) -> AdapterConfig:
    """Rank and alpha for experts that come without an adapter_config.json.

    Raises:
        InvalidField: no file records lora_alpha and the caller does not give it.
    """
    alpha = config.alpha
    if options.lora_alpha is not None:
        alpha = parse_alpha(options.lora_alpha, config.file, "lora_alpha", files)
    if alpha is None:
        expected = "the experts' alpha, which no file records; pass lora_alpha="
        raise InvalidField(config.file, "lora_alpha", found="nothing", expected=expected)
    return AdapterConfig(config.file, config.rank, alpha)


def _field(recorded: dict[str, Any], name: str) -> str:
    return f"_dylora_{name}" if f"_dylora_{name}" in recorded else name


def _optional(value: object, file: Path, name: str) -> int | None:
    return None if value is None else require_integer(value, file, name, low=1, high=MAX_EXPERTS)


def _alpha(value: object, file: Path, name: str, files: CheckpointFiles) -> float | None:
    return None if value is None else parse_alpha(value, file, name, files)


def _base_model(recorded: dict[str, Any], file: Path) -> str | None:
    for name in _BASE_FIELDS:
        base = optional_text(recorded.get(name), file, name)
        if base is not None:
            return base
    return None
