"""DyLoRA-MoE's full state: base model, experts and router in one state dict (August to October 2025).

Keys: foundation_model.base_model.model.<module>.base_layer.weight, ....lora_A.expert_K.weight, router.gate.weight.
Beside it may lie config.json (none, its own, or the base model's with _dylora_* added) and dylo_moe_state/router.pt, in the
directory or in its parent, as train.py wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dylo_moe.errors import (
    ExpertCountMismatch,
    ExpertMissing,
    ForeignTensor,
    IncompletePair,
)
from dylo_moe.formats.adapter import (
    Pairs,
    build_expert,
    check_pairs,
    module_of,
    pair_up,
)
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.base import BaseModel, check_config, check_fit, check_headers
from dylo_moe.formats.checkpoint import Checkpoint, Expert
from dylo_moe.formats.dylora import with_own_targets
from dylo_moe.formats.dylora_config import DyloraConfig, adapter_config, read_dylora_config
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.router_file import Gate, gate_from, gate_infos, read_gate, router_state
from dylo_moe.formats.safetensors_file import TensorInfo
from dylo_moe.formats.tokenizer_files import tokenizer_directory
from dylo_moe.formats.weights import WeightFiles, check_base_weights, find_weights, open_weights

FORMAT = "dylora-full-state"
_MODEL, _ROUTER = "foundation_model.", "router."
_EXPERT_KEY = re.compile(r".+\.lora_[AB]\.(?P<expert>expert_(?:0|[1-9][0-9]{0,5}))\.weight")
STATE_ROUTER = Path("dylo_moe_state") / "router.pt"


@dataclass(frozen=True)
class FullState:
    """A state dict, sorted: keys per expert, keys of the router, base key -> base-model parameter name."""

    file: Path
    experts: dict[str, Pairs]
    router: tuple[str, ...]
    base: dict[str, str]


def read_full_state(files: CheckpointFiles, options: ReadOptions, file: Path | None = None) -> Checkpoint:
    """Read a directory with a full state, or the one file that the user named.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = read_dylora_config(files)
    adapter = adapter_config(config, options, files)
    _check_numbers(config)
    weights = find_weights(files, files.root) if file is None else WeightFiles((file,), {})
    header, tensors_of = open_weights(files, weights)
    state = sort_state(header, adapter, weights.paths[0])
    check_headers(_base_of(config, state, {name: header[key].shape for key, name in state.base.items()}), config.file)
    return assemble(files, state, tensors_of(), config=config, adapter=adapter, options=options)


def _check_numbers(config: DyloraConfig) -> None:
    """The base model's configuration, where config.json holds it, before any weight is read; its type may be missing."""
    if config.base_config is not None:
        check_config({"model_type": "", **config.base_config}, config.file)


def _base_of(config: DyloraConfig, state: FullState, shapes: Mapping[str, tuple[int, ...]]) -> BaseModel:
    return BaseModel(state.file, config.base_config or {}, shapes)


def sort_state(header: Mapping[str, TensorInfo], adapter: AdapterConfig, file: Path) -> FullState:
    """Sort the keys and check every pair and the gate, from the header alone."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    base: dict[str, str] = {}
    router = tuple(key for key in header if key.startswith(_ROUTER))
    for key, info in header.items():
        if key in router:
            continue
        match = _EXPERT_KEY.fullmatch(key)
        if match:
            grouped.setdefault(match["expert"], {})[key] = info
        elif not key.startswith(_MODEL) or ".lora_" in key or ".modules_to_save." in key:
            expected = "weights of foundation_model, of expert_K and of router.gate"
            raise ForeignTensor(file, key, found="a tensor that belongs to none of them", expected=expected)
        else:
            base[key] = module_of(key).replace(".base_layer.", ".")
    gate_infos({key.removeprefix(_ROUTER): header[key] for key in router}, file)
    names = _expert_names(grouped, file)
    experts = {name: check_pairs(pair_up(grouped[name], name, file), adapter, file) for name in names}
    _check_wrapped(experts, base, file)
    return FullState(file, experts, router, base)


def _expert_names(grouped: Mapping[str, object], file: Path) -> list[str]:
    if not grouped:
        raise ExpertMissing(file, "expert_0", found="no tensors of an expert", expected="lora_A.expert_0.weight, ...")
    last = max(int(name.removeprefix("expert_")) for name in grouped)
    for number in range(min(last, len(grouped)) + 1):
        if f"expert_{number}" not in grouped:
            expected = f"its tensors, since there are tensors of expert_{last}"
            raise ExpertMissing(file, f"expert_{number}", found="no tensors", expected=expected)
    return [f"expert_{number}" for number in range(last + 1)]


def _check_wrapped(experts: Mapping[str, Pairs], base: Mapping[str, str], file: Path) -> None:
    wrapped = {module_of(key).partition(".base_layer.")[0] for key in base if ".base_layer." in key}
    for name, pairs in experts.items():
        for module in sorted(wrapped - set(pairs)):
            raise IncompletePair(file, f"{module}.lora_A.{name}", found="no tensor", expected="a pair for every base_layer")
        for module in sorted(set(pairs) - wrapped):
            raise ForeignTensor(file, f"{module}.lora_A.{name}", found="a tensor", expected="a base_layer of that name")


def assemble(
    files: CheckpointFiles,
    state: FullState,
    tensors: Mapping[str, Tensor],
    *,
    config: DyloraConfig,
    adapter: AdapterConfig,
    options: ReadOptions,
) -> Checkpoint:
    """The Checkpoint of a sorted state dict and its tensors."""
    count = len(state.experts)
    if config.num_experts is not None and config.num_experts != count:
        expected = f"{config.num_experts} experts of {config.file.name}"
        raise ExpertCountMismatch(state.file, "", found=f"{count} experts", expected=expected)
    gate = gate_from({key.removeprefix(_ROUTER): tensors[key] for key in state.router}, {}, state.file)
    gate = _with_recorded_settings(files, gate)
    base_state = {name: tensors[key] for key, name in state.base.items()}
    check_base_weights(base_state, state.file)
    experts, router = _experts(state, tensors, adapter), router_state(files, gate, count, options)
    base = _base_of(config, state, {name: tuple(tensor.shape) for name, tensor in base_state.items()})
    check_headers(base, config.file)
    check_fit(base, experts, router)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=config.base_model,
        experts=experts,
        router=router,
        base_config=config.base_config,
        base_state=base_state,
        tokenizer=tokenizer_directory(files.root),
    )


def _experts(state: FullState, tensors: Mapping[str, Tensor], adapter: AdapterConfig) -> tuple[Expert, ...]:
    return tuple(
        with_own_targets(build_expert(name, pairs, tensors, adapter, state.file)) for name, pairs in state.experts.items()
    )


def _with_recorded_settings(files: CheckpointFiles, gate: Gate) -> Gate:
    """The gate with top_k and temperature of dylo_moe_state/router.pt, provided that this file holds the same gate."""
    for directory in (files.root, files.root.parent):
        path = directory / STATE_ROUTER
        if not files.exists(path):
            continue
        place = CheckpointFiles(path.parent)
        beside = read_gate(place, path)
        files.hashes.update({files.relative(path): digest for digest in place.hashes.values()})
        if _same(gate.weight, beside.weight) and _same(gate.bias, beside.bias):
            return replace(gate, recorded=beside.recorded)
        files.warn(f"{files.relative(path)} holds another gate than {gate.file.name}; it was not used")
    return gate


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))
