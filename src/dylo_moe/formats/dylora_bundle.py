"""DyLoRA-MoE's test bundle: one .pt with the keys foundation_model, router, expert_manager and model_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dylo_moe.errors import GateMissing, InvalidField, UnknownFormat
from dylo_moe.formats.adapter import flat_tensors, infos
from dylo_moe.formats.adapter_config import optional_text, parse_alpha, parse_rank
from dylo_moe.formats.checkpoint import Checkpoint
from dylo_moe.formats.dylora_config import MAX_EXPERTS, DyloraConfig, adapter_config
from dylo_moe.formats.dylora_full import assemble, sort_state
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import require_integer

FORMAT = "dylora-bundle"
_SECTIONS = ("foundation_model", "router", "expert_manager", "model_config")


def read_bundle(files: CheckpointFiles, options: ReadOptions, file: Path) -> Checkpoint:
    """Read the one file.

    Raises:
        UnknownFormat: the dict has other keys. CheckpointError: any of its other subclasses, naming file and field.
    """
    tree = files.pickle(file)
    if not set(tree) >= {"foundation_model", "router"}:
        found = f"a dict with the keys {', '.join(sorted(tree)[:6])}"
        raise UnknownFormat(file, "", found=found, expected=f"the keys {', '.join(_SECTIONS)}")
    for key in tree:
        if key not in _SECTIONS:
            files.warn(f"{file.name}: {key} was ignored")
    config = _config(files, tree, file)
    adapter = adapter_config(config, options, files)
    tensors = _section(tree, "foundation_model", file) | _section(tree, "router", file)
    if "router.gate.weight" not in tensors:
        raise GateMissing(file, "router", found="no gate.weight", expected="gate.weight (experts, hidden)")
    flat = flat_tensors(tensors, file)
    state = sort_state(infos(flat), adapter, file)
    read = assemble(files, state, flat, config=config, adapter=adapter, options=options)
    return Checkpoint(**{**vars(read), "format": FORMAT})


def _section(tree: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    section = tree.get(name, {})
    if not isinstance(section, dict):
        raise InvalidField(file, name, found=type(section).__name__, expected="a dict")
    return {f"{name}.{key}": value for key, value in section.items()}


def _config(files: CheckpointFiles, tree: dict[str, Any], file: Path) -> DyloraConfig:
    manager, model = tree.get("expert_manager") or {}, tree.get("model_config") or {}
    for name, section in (("expert_manager", manager), ("model_config", model)):
        if not isinstance(section, dict):
            raise InvalidField(file, name, found=type(section).__name__, expected="a dict")
    recorded = {**model, **manager}
    count, rank, alpha = recorded.get("num_experts"), recorded.get("lora_r"), recorded.get("lora_alpha")
    base = recorded.get("base_model_name_or_path", recorded.get("model_name"))
    return DyloraConfig(
        file=file,
        data={},
        num_experts=None if count is None else require_integer(count, file, "num_experts", low=1, high=MAX_EXPERTS),
        rank=None if rank is None else parse_rank(rank, file, "lora_r"),
        alpha=None if alpha is None else parse_alpha(alpha, file, "lora_alpha", files),
        base_model=optional_text(base, file, "model_config.base_model_name_or_path"),
    )
