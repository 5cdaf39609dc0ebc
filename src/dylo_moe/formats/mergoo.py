"""mergoo's LoRA mixture (Leeroo-AI/mergoo): base model, experts and gates in one Hugging Face checkpoint.

y = W x + b + sum_e w_e s_e B_e A_e x in each routed Linear, w = softmax over the k largest logits of gate(x).
Keys: the base model's own, <module>.base_layer.weight where it is routed, <module>.lora_A.{e}.weight, lora_B.{e}.weight and,
once trained, <module>.gate.weight. config.json is the base model's, with five fields added; model_type stays the base's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylo_moe.errors import ExpertCountMismatch, ForeignTensor, GateMissing, IncompletePair, InvalidField
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text, parse_alpha, parse_rank
from dylo_moe.formats.base import BaseModel, check_config, check_fit, check_headers
from dylo_moe.formats.checkpoint import Checkpoint, GatesState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.gated import (
    GATE,
    MAX_EXPERTS,
    GatedState,
    Part,
    build_experts,
    build_gates,
    check_top_k,
    check_units,
    layer_number,
    refuse_options,
    sort_units,
)
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import TensorInfo, require_integer
from dylo_moe.formats.tokenizer_files import tokenizer_directory
from dylo_moe.formats.weights import check_base_weights, find_weights, open_weights

FORMAT = "mergoo"
_FIELDS = ("num_experts", "num_experts_per_tok", "router_layers", "router_layers_index", "adapter_configs")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.(?P<expert>0|[1-9][0-9]{0,5})\.weight")
_INSIDE = (".lora_", ".modules_to_save.", ".original_module.")


@dataclass(frozen=True)
class MergooConfig:
    """What config.json says beside the base model's own fields. layers: numbers of the routed layers, None for all."""

    file: Path
    base: Mapping[str, Any]
    num_experts: int
    top_k: int
    routed: tuple[str, ...]
    layers: frozenset[int] | None
    adapters: tuple[AdapterConfig, ...]


def read_mergoo(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a trained mergoo checkpoint; one that was only composed has no gates and is refused.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = _read_config(files)
    refuse_options(options, config.file)
    header, tensors_of = open_weights(files, find_weights(files, files.root))
    file = files.root
    state, base = _sort(header, config, file)
    shapes = BaseModel(file, config.base, {name: header[key].shape for key, name in base.items()})
    check_headers(shapes, config.file)
    _check_routed(state.units, config)
    top_k = config.top_k if options.top_k is None else check_top_k(options.top_k, config.num_experts, config.file)
    tensors = tensors_of()
    base_state = {name: tensors[key] for key, name in base.items()}
    check_base_weights(base_state, file)
    experts = build_experts(state, tensors)
    router = GatesState(build_gates(state, tensors, lambda _: top_k), "topk_softmax", config.num_experts)
    check_fit(shapes, experts, None)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=config.adapters[0].base_model,
        experts=experts,
        router=router,
        base_config=config.base,
        base_state=base_state,
        tokenizer=tokenizer_directory(files.root),
    )


def _read_config(files: CheckpointFiles) -> MergooConfig:
    path = files.root / "config.json"
    data = files.read_json(path)
    base = {name: value for name, value in data.items() if name not in _FIELDS}
    check_config(base, path)
    count = require_integer(data.get("num_experts"), path, "num_experts", low=1, high=MAX_EXPERTS)
    recorded = data["adapter_configs"]
    if len(recorded) != count:
        raise ExpertCountMismatch(path, "adapter_configs", found=f"{len(recorded)} entries", expected=f"{count}, num_experts")
    routed, layers = data["router_layers"], data.get("router_layers_index")
    if not isinstance(routed, list) or not routed or not all(isinstance(name, str) and name for name in routed):
        raise InvalidField(path, "router_layers", found=repr(routed)[:80], expected="a list of module names")
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)):
        raise InvalidField(path, "router_layers_index", found=repr(layers)[:80], expected="layer numbers")
    return MergooConfig(
        file=path,
        base=base,
        num_experts=count,
        top_k=require_integer(data.get("num_experts_per_tok"), path, "num_experts_per_tok", low=1, high=count),
        routed=tuple(routed),
        layers=None if layers is None else frozenset(layers),
        adapters=tuple(_adapter(value, files, path, f"adapter_configs[{number}]") for number, value in enumerate(recorded)),
    )


def _adapter(value: object, files: CheckpointFiles, path: Path, name: str) -> AdapterConfig:
    if not isinstance(value, dict):
        raise InvalidField(path, name, found=type(value).__name__, expected="an adapter's configuration")
    if value.get("use_dora"):
        raise InvalidField(path, f"{name}.use_dora", found=repr(value["use_dora"])[:80], expected="false: mergoo has no DoRA")
    rslora = value.get("use_rslora")
    if rslora not in (None, True, False):
        raise InvalidField(path, f"{name}.use_rslora", found=repr(rslora)[:80], expected="true or false")
    for field in ("rank_pattern", "alpha_pattern"):
        if value.get(field):
            files.warn(f"{files.relative(path)}: {name}.{field} is ignored, as mergoo ignores it")
    return AdapterConfig(
        path,
        parse_rank(value.get("r"), path, f"{name}.r"),
        parse_alpha(value.get("lora_alpha"), path, f"{name}.lora_alpha", files),
        use_rslora=bool(rslora),
        base_model=optional_text(value.get("base_model_name_or_path"), path, f"{name}.base_model_name_or_path"),
    )


def _sort(header: Mapping[str, TensorInfo], config: MergooConfig, file: Path) -> tuple[GatedState, dict[str, str]]:
    """The experts and gates, checked, and base key -> name of the base model's parameter."""
    wrapped = {key.partition(".base_layer.")[0] for key in header if ".base_layer." in key}
    adapted = wrapped | {match["module"] for match in map(_LORA.fullmatch, header) if match}
    meanings = {key: part for key in header if (part := _meaning(key, adapted)) is not None}
    base = {key: key.replace(".base_layer.", ".") for key in header if key not in meanings}
    for key in base:
        if any(inside in key for inside in _INSIDE):
            raise ForeignTensor(file, key, found="a tensor", expected="base weights, lora_A.K, lora_B.K and gates")
    if not any(part.kind == GATE for part in meanings.values()):
        found = "no gate in the whole checkpoint: it was composed and not trained, and mergoo itself draws random gates"
        raise GateMissing(file, "gate.weight", found=found, expected="a trained checkpoint")
    units = sort_units({key: header[key] for key in meanings}, meanings.get, file)
    recorded = (config.num_experts, config.file, "num_experts")
    state = check_units(units, lambda number: config.adapters[number], file, gate="gate.weight", recorded=recorded)
    for module in sorted(wrapped ^ set(units)):
        if module in units:
            raise ForeignTensor(file, f"{module}.lora_A", found="a tensor", expected=f"{module}.base_layer.weight beside it")
        raise IncompletePair(file, f"{module}.lora_A", found="no tensor", expected="experts for every base_layer")
    return state, base


def _meaning(key: str, adapted: set[str]) -> Part | None:
    match = _LORA.fullmatch(key)
    if match is not None:
        return Part(match["module"], match["half"], int(match["expert"]))
    module = key.removesuffix(".gate.weight")
    return Part(module, GATE) if module != key and module in adapted else None


def _check_routed(units: Iterable[str], config: MergooConfig) -> None:
    """The routed modules are exactly those that config.json names: mergoo draws the others' weights, or does not read them."""
    found = {(layer_number(module), module.rpartition(".")[2]): module for module in units}
    layers = config.layers if config.layers is not None else range(config.base.get("num_hidden_layers", 0))
    for (layer, name), module in found.items():
        if name not in config.routed:
            raise InvalidField(config.file, "router_layers", found=f"no {name}", expected=f"it, since {module} has experts")
        if config.layers is not None and layer not in config.layers:
            expected = f"{layer}, since {module} has experts"
            raise InvalidField(config.file, "router_layers_index", found=f"no {layer}", expected=expected)
    for layer in sorted(layers):
        for name in config.routed:
            if (layer, name) not in found:
                expected = "experts and a gate for each of router_layers"
                raise IncompletePair(config.file, f"layer {layer}: {name}", found="no experts", expected=expected)
