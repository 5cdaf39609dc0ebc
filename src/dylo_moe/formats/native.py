"""The native format, reading: moe_config.json, experts/<name>/ and shared/ (each a plain PEFT LoRA), router.safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dylo_moe.errors import ExpertCountMismatch, ExpertMissing, GateMissing, InvalidField, MissingFile
from dylo_moe.formats.adapter import check_expert_name, one_base_model, read_adapter
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text
from dylo_moe.formats.checkpoint import Checkpoint, Expert, Router, RouterState
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.patterns import natural_sorted
from dylo_moe.formats.router_file import check_router_values, gate_rows, read_gate
from dylo_moe.formats.router_fit import check_router_fits
from dylo_moe.formats.router_sections import GATES, XLORA, overridden, read_gates, read_xlora
from dylo_moe.formats.safetensors_file import require_integer
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "dylo-moe"
CONFIG = "moe_config.json"
ROUTER = "router.safetensors"
EXPERTS = "experts"
SHARED = "shared"
HYBRID = "dynamic_hybrid"
MARK = "dylo_moe"
VERSION = 1
MAX_EXPERTS = 4_096
LOAD_BALANCE_TYPES = ("mse", "switch", "none")


def read_native(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a directory that write_native wrote.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    path = files.root / CONFIG
    config = files.read_json(path)
    _check_version(config, path)
    names = _expert_names(config, path)
    _check_directories(files, names)
    read = [read_adapter(files, files.root / EXPERTS / name, name) for name in names]
    _check_scalings(config["experts"], [adapter for _, adapter in read], path)
    base = one_base_model(adapter for _, adapter in read)
    experts = tuple(expert for expert, _ in read)
    shared = _shared(files, config, names)
    router = _router(files, config, len(names), options)
    check_router_fits(router, experts, path)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=_base_model(config, base, path),
        experts=experts,
        router=router,
        shared=shared,
        load_balance=_load_balance(config, path),
        tokenizer=tokenizer_directory(files.root),
    )


def _check_version(config: dict[str, Any], path: Path) -> None:
    if config.get("format") != MARK:
        raise InvalidField(path, "format", found=repr(config.get("format"))[:80], expected=repr(MARK))
    version = config.get("format_version")
    if type(version) is not int or version != VERSION:
        raise InvalidField(path, "format_version", found=repr(version)[:80], expected=f"{VERSION}, the only version so far")


def _expert_names(config: dict[str, Any], path: Path) -> list[str]:
    listed = config.get("experts")
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise InvalidField(path, "experts", found=repr(listed)[:80], expected="a list of objects with a name")
    names = [entry.get("name") for entry in listed]
    for name in names:
        if not isinstance(name, str):
            raise InvalidField(path, "experts[].name", found=repr(name)[:80], expected="text")
        check_expert_name(name, path)
        if names.count(name) > 1:
            raise InvalidField(path, "experts[].name", found=f"{name!r} twice", expected="each name once")
    count = require_integer(config.get("num_experts"), path, "num_experts", low=1, high=MAX_EXPERTS)
    if count != len(names):
        raise ExpertCountMismatch(path, "num_experts", found=count, expected=f"{len(names)}, the length of experts")
    return names


def _check_directories(files: CheckpointFiles, names: list[str]) -> None:
    directory = files.root / EXPERTS
    if not directory.is_dir():
        raise MissingFile(directory, "", found="no such directory", expected="one directory per expert")
    present = {entry.name for entry in entries(directory) if entry.is_dir()}
    for name in names:
        if name not in present:
            raise ExpertMissing(directory / name, "", found="no such directory", expected=f"the files of expert {name!r}")
    extra = natural_sorted(present - set(names))
    if extra:
        found = f"{', '.join(extra)}, not in {CONFIG}"
        raise ExpertCountMismatch(directory, "", found=found, expected=f"{len(names)} experts")


def _check_scalings(listed: list[dict[str, Any]], configs: list[AdapterConfig], path: Path) -> None:
    for entry, config in zip(listed, configs, strict=True):
        recorded = entry.get("scaling")
        if recorded is None:
            continue
        divisor = math.sqrt(config.rank) if config.use_rslora else config.rank
        scaling = config.alpha / divisor
        if type(recorded) not in (int, float) or not math.isclose(recorded, scaling, rel_tol=1e-6):
            expected = f"{scaling}, from {config.file}"
            raise InvalidField(path, f"experts[{entry['name']}].scaling", found=repr(recorded)[:80], expected=expected)


def _shared(files: CheckpointFiles, config: dict[str, Any], names: list[str]) -> Expert | None:
    path, directory = files.root / CONFIG, files.root / SHARED
    section = config.get("shared")
    if section is None:
        if files.exists(directory / "adapter_config.json"):
            raise InvalidField(path, "shared", found="null", expected=f"the adapter's name, since {SHARED}/ exists")
        return None
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str) or name in names:
        raise InvalidField(path, "shared", found=repr(section)[:80], expected="an object with a name that no expert has")
    if not directory.is_dir():
        raise MissingFile(directory, "", found="no such directory", expected=f"the files of the shared adapter {name!r}")
    expert, adapter = read_adapter(files, directory, name)
    _check_scalings([section], [adapter], path)
    return expert


def _base_model(config: dict[str, Any], recorded: str | None, path: Path) -> str | None:
    base = optional_text(config.get("base_model_name_or_path"), path, "base_model_name_or_path")
    if base is not None and recorded is not None and base != recorded:
        raise InvalidField(path, "base_model_name_or_path", found=repr(base), expected=f"{recorded!r}, as in the experts")
    return base or recorded


def _router(files: CheckpointFiles, config: dict[str, Any], count: int, options: ReadOptions) -> Router | None:
    path, tensor_path = files.root / CONFIG, files.root / ROUTER
    section = config.get("router")
    if section is None:
        if files.exists(tensor_path):
            raise InvalidField(path, "router", found="null", expected=f"the router's settings, since {ROUTER} exists")
        return None
    readers = {XLORA: read_xlora, GATES: read_gates}
    kind = section.get("type") if isinstance(section, dict) else None
    if not isinstance(kind, str) or kind not in (HYBRID, *readers):
        expected = f"null or one of the types {', '.join((HYBRID, *readers))}"
        raise InvalidField(path, "router", found=repr(section)[:80], expected=expected)
    if not files.exists(tensor_path):
        raise GateMissing(
            tensor_path,
            "gate.weight" if kind == HYBRID else "",
            found="no such file",
            expected=f"the router that {CONFIG} describes",
        )
    if kind == HYBRID:
        return _hybrid(section, files, count, options)
    return readers[kind](overridden(section, options, path), files, (path, tensor_path), count)


def _hybrid(section: dict[str, Any], files: CheckpointFiles, count: int, options: ReadOptions) -> RouterState:
    path = files.root / CONFIG
    top_k = section.get("top_k") if options.top_k is None else options.top_k
    temperature = section.get("temperature") if options.temperature is None else options.temperature
    features = section.get("features") if options.router_features is None else options.router_features
    check_router_values(path, count, top_k=top_k, temperature=temperature, features=features)
    gate = read_gate(files, files.root / ROUTER)
    gate_rows(gate, count, section.get("hidden_size"), path)
    return RouterState(gate.weight, gate.bias, features, top_k, float(temperature))


def _load_balance(config: dict[str, Any], path: Path) -> dict[str, Any]:
    section = config.get("load_balance") or {}
    if not isinstance(section, dict):
        raise InvalidField(path, "load_balance", found=repr(section)[:80], expected="an object")
    known = {key: section[key] for key in ("load_balance_loss_type", "router_aux_loss_coef") if key in section}
    kind, coefficient = known.get("load_balance_loss_type", "none"), known.get("router_aux_loss_coef", 0.0)
    if kind not in LOAD_BALANCE_TYPES:
        expected = f"one of {', '.join(LOAD_BALANCE_TYPES)}"
        raise InvalidField(path, "load_balance_loss_type", found=repr(kind)[:80], expected=expected)
    if type(coefficient) not in (int, float) or coefficient < 0:
        raise InvalidField(path, "router_aux_loss_coef", found=repr(coefficient)[:80], expected="a number from 0 up")
    return known
