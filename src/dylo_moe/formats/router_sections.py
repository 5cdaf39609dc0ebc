"""The native format's other routers: X-LoRA's classifier and per-unit gates. Settings are JSON, tensors lie in one file.

In moe_config.json, beside "dynamic_hybrid" (see native.py):
    {"type": "xlora", "layers": [{"inputs", "outputs", "bias"}, ...], and the settings of XLoraState by their names}
    {"type": "gates", "level", "rule", "temperature", "threshold", "activation",
     "mixlora_switch", "expert_capacity",
     "gates": [{"unit", "experts", "inputs", "top_k", "bias", "threshold_gate": null | "weight" | "weight and bias"}, ...]}
In router.safetensors:
    classifier.layers.<i>.weight (outputs, inputs), .bias (outputs,)
    gates.<unit>.weight (experts, inputs), .bias (experts,), .threshold_weight (1, inputs), .threshold_bias (1,)
Every shape can be told from the JSON alone, so that a lost or a foreign tensor is seen in the header.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import ForeignTensor, GateMissing, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter import check_finite
from dylo_moe.formats.adapter_config import optional_text
from dylo_moe.formats.checkpoint import GATE_RULES, MIXLORA_SWITCH, SOFTMAX_TOPK, GatesState, GateState, XLoraState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.router_file import MAX_TEMPERATURE, MIN_TEMPERATURE
from dylo_moe.formats.safetensors_file import MAX_TENSORS, TensorInfo, require_float, require_integer
from dylo_moe.formats.switch import MAX_CAPACITY, SWITCH, warn_of_switch
from dylo_moe.formats.xlora_classifier import check_softmax_topk, warn_of_batch

XLORA, GATES = "xlora", "gates"
LEVELS = ("linear", "feed_forward")
MAX_WIDTH = 10_000_000
_FLAGS = ("layerwise", "enable_softmax", "enable_softmax_topk", "use_relu")
_OTHERS = ("softmax_topk", "num_layers", "softmax_temperature", "top_k", "global_scaling_weight", "dropout")
_THRESHOLD_GATES = {None: 0, "weight": 1, "weight and bias": 2}
Shapes = dict[str, tuple[int, ...]]


def xlora_section(state: XLoraState) -> dict[str, Any]:
    layers = [{"inputs": w.shape[1], "outputs": w.shape[0], "bias": bias is not None} for w, bias in state.layers]
    settings = {name: getattr(state, name) for name in (*_FLAGS, *_OTHERS)}
    return {"type": XLORA, "features": state.features, "layers": layers, **settings}


def gates_section(state: GatesState) -> dict[str, Any]:
    names = ("level", "rule", "temperature", "threshold", "activation", "mixlora_switch", "expert_capacity")
    settings = {name: getattr(state, name) for name in names}
    gates = [
        {
            "unit": unit,
            "experts": gate.weight.shape[0],
            "inputs": gate.weight.shape[1],
            "top_k": gate.top_k,
            "bias": gate.bias is not None,
            "threshold_gate": _threshold_gate(gate),
        }
        for unit, gate in state.gates.items()
    ]
    return {"type": GATES, "features": state.features, **settings, "gates": gates}


def _threshold_gate(gate: GateState) -> str | None:
    if gate.threshold_weight is None:
        return None
    return "weight" if gate.threshold_bias is None else "weight and bias"


def router_tensors(state: XLoraState | GatesState) -> dict[str, Tensor]:
    """The tensors by their names in router.safetensors."""
    named: dict[str, Tensor | None] = {}
    if isinstance(state, XLoraState):
        for index, (weight, bias) in enumerate(state.layers):
            named |= {f"classifier.layers.{index}.weight": weight, f"classifier.layers.{index}.bias": bias}
    else:
        for unit, gate in state.gates.items():
            named |= {f"gates.{unit}.weight": gate.weight, f"gates.{unit}.bias": gate.bias}
            named[f"gates.{unit}.threshold_weight"] = gate.threshold_weight
            named[f"gates.{unit}.threshold_bias"] = gate.threshold_bias
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def read_xlora(section: Mapping[str, Any], files: CheckpointFiles, paths: tuple[Path, Path], count: int) -> XLoraState:
    """The classifier for `count` experts; paths: the JSON file and the tensor file.

    Raises:
        InvalidField, GateMissing, ForeignTensor, ShapeMismatch, DtypeUnsupported, NonFiniteTensor.
    """
    path, tensor_path = paths
    widths, biased = _classifier_layers(section, path)
    settings = _xlora_settings(section, path, count)
    outputs = count * (settings["num_layers"] if settings["layerwise"] else 1)
    if widths[-1] != outputs:
        raise ShapeMismatch(path, "router.layers", found=f"{widths[-1]} outputs", expected=f"{outputs} for {count} experts")
    shapes: Shapes = {}
    for index, has_bias in enumerate(biased):
        shapes[f"classifier.layers.{index}.weight"] = (widths[index + 1], widths[index])
        if has_bias:
            shapes[f"classifier.layers.{index}.bias"] = (widths[index + 1],)
    tensors = _read(files, tensor_path, shapes)
    names = [f"classifier.layers.{index}" for index in range(len(biased))]
    layers = tuple((tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names)
    state = XLoraState(layers=layers, num_experts=count, **settings)
    warn_of_batch(state, files)
    return state


def _classifier_layers(section: Mapping[str, Any], path: Path) -> tuple[list[int], list[bool]]:
    """Width of the input and of each layer's output, and which layers have a bias."""
    listed = _objects(section.get("layers"), path, "router.layers", 1_000)
    widths: list[int] = []
    for index, layer in enumerate(listed):
        field = f"router.layers[{index}]"
        inputs = require_integer(layer.get("inputs"), path, f"{field}.inputs", low=1, high=MAX_WIDTH)
        if widths and inputs != widths[-1]:
            expected = f"{widths[-1]}, the outputs of the layer before"
            raise ShapeMismatch(path, f"{field}.inputs", found=inputs, expected=expected)
        widths += [] if widths else [inputs]
        widths.append(require_integer(layer.get("outputs"), path, f"{field}.outputs", low=1, high=MAX_WIDTH))
    return widths, [_flag(layer.get("bias"), path, f"router.layers[{i}].bias") for i, layer in enumerate(listed)]


def _xlora_settings(section: Mapping[str, Any], path: Path, count: int) -> dict[str, Any]:
    settings = {name: _flag(section.get(name), path, f"router.{name}") for name in _FLAGS}
    settings["softmax_topk"] = _one_of({"softmax_topk": "token", **section}, "softmax_topk", path, SOFTMAX_TOPK)
    settings["num_layers"] = require_integer(section.get("num_layers"), path, "router.num_layers", low=1, high=MAX_TENSORS)
    settings["top_k"] = _top_k(section.get("top_k"), path, "router.top_k", count)
    settings["softmax_temperature"] = _number(section, "softmax_temperature", path, MIN_TEMPERATURE, MAX_TEMPERATURE)
    settings["global_scaling_weight"] = _number(section, "global_scaling_weight", path)
    settings["dropout"] = _number(section, "dropout", path)
    if not 0 <= settings["dropout"] < 1:
        raise InvalidField(path, "router.dropout", found=settings["dropout"], expected="a number from 0 to below 1")
    return settings


def read_gates(section: Mapping[str, Any], files: CheckpointFiles, paths: tuple[Path, Path], count: int) -> GatesState:
    """The gates of a model with `count` experts; see read_xlora."""
    path, tensor_path = paths
    rule = _one_of(section, "rule", path, tuple(GATE_RULES))
    threshold = None if section.get("threshold") is None else _number(section, "threshold", path)
    listed = _objects(section.get("gates"), path, "router.gates", MAX_TENSORS)
    top_ks: dict[str, int | None] = {}
    shapes: Shapes = {}
    for index, gate in enumerate(listed):
        field = f"router.gates[{index}]"
        unit = gate.get("unit")
        if not isinstance(unit, str) or not unit or unit in top_ks:
            raise InvalidField(path, f"{field}.unit", found=repr(unit)[:80], expected="a module's path, each once")
        here = require_integer(gate.get("experts"), path, f"{field}.experts", low=1, high=count)
        top_ks[unit] = _top_k(gate.get("top_k"), path, f"{field}.top_k", here)
        shapes |= _gate_shapes(gate, path, field, here)
    tensors = _read(files, tensor_path, shapes)
    gates = {unit: _gate(unit, top_k, tensors) for unit, top_k in top_ks.items()}
    level, temperature = (
        _one_of(section, "level", path, LEVELS),
        _number(section, "temperature", path, MIN_TEMPERATURE, MAX_TEMPERATURE),
    )
    activation = optional_text(section.get("activation"), path, "router.activation")
    state = GatesState(gates, rule, count, level, temperature, threshold, activation, *_switch(section, path))
    warn_of_switch(state, files)
    return state


def _switch(section: Mapping[str, Any], path: Path) -> tuple[str | None, int | None]:
    """mixlora_switch and expert_capacity."""
    switch = _one_of({"mixlora_switch": None, **section}, "mixlora_switch", path, (None, *MIXLORA_SWITCH))
    capacity = section.get("expert_capacity")
    if capacity is not None:
        capacity = require_integer(capacity, path, "router.expert_capacity", low=1, high=MAX_CAPACITY)
    return switch, capacity


def _gate_shapes(gate: Mapping[str, Any], path: Path, field: str, here: int) -> Shapes:
    start = f"gates.{gate['unit']}"
    inputs = require_integer(gate.get("inputs"), path, f"{field}.inputs", low=1, high=MAX_WIDTH)
    shapes: Shapes = {f"{start}.weight": (here, inputs)}
    if _flag(gate.get("bias"), path, f"{field}.bias"):
        shapes[f"{start}.bias"] = (here,)
    parts = _THRESHOLD_GATES[_one_of(gate, "threshold_gate", path, tuple(_THRESHOLD_GATES), field)]
    return shapes | dict([(f"{start}.threshold_weight", (1, inputs)), (f"{start}.threshold_bias", (1,))][:parts])


def _gate(unit: str, top_k: int | None, tensors: Mapping[str, Tensor]) -> GateState:
    weight, *others = (tensors.get(f"gates.{unit}.{part}") for part in ("weight", "bias", "threshold_weight", "threshold_bias"))
    return GateState(weight, others[0], top_k, others[1], others[2])


def _read(files: CheckpointFiles, path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Exactly these tensors, once the header says that they are there, and nothing else."""
    header: dict[str, TensorInfo] = files.header(path)
    for name, shape in shapes.items():
        if name not in header:
            raise GateMissing(path, name, found="no such tensor", expected=f"shape {shape}")
        require_float(header[name], name, path)
        if header[name].shape != shape:
            raise ShapeMismatch(path, name, found=f"shape {header[name].shape}", expected=f"{shape}, as moe_config.json says")
    for name in header:
        if name not in shapes:
            raise ForeignTensor(path, name, found="a tensor", expected="only those of the router in moe_config.json")
    tensors = files.tensors(path)
    check_finite(tensors, path)
    return tensors


def overridden(section: Mapping[str, Any], options: ReadOptions, path: Path) -> dict[str, Any]:
    """The section with what the caller says in the place of what it records.

    Raises:
        InvalidField: other features than these routers have, or a top_k per layer.
    """
    changed = dict(section)
    check_softmax_topk(options, path)
    if options.softmax_topk is not None and section.get("type") == XLORA:
        changed["softmax_topk"] = options.softmax_topk
    if options.mixlora_switch is not None and section.get("rule") == SWITCH:
        changed["mixlora_switch"] = options.mixlora_switch
    if options.router_features not in (None, section.get("features")):
        found = repr(options.router_features)[:80]
        raise InvalidField(path, "features", found=found, expected=f"{section.get('features')!r}, for this router")
    if options.temperature is not None:
        changed["softmax_temperature" if section.get("type") == XLORA else "temperature"] = options.temperature
    if options.top_k is not None and section.get("type") == XLORA:
        changed["top_k"] = options.top_k
    elif options.top_k is not None:
        listed = _objects(section.get("gates"), path, "router.gates", MAX_TENSORS)
        changed["gates"] = [{**gate, "top_k": options.top_k} for gate in listed]
    return changed


def _objects(value: object, path: Path, field: str, limit: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 1 <= len(value) <= limit or not all(isinstance(item, dict) for item in value):
        raise InvalidField(path, field, found=repr(value)[:80], expected=f"a list of 1 to {limit:,} objects")
    return value


def _flag(value: object, path: Path, field: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidField(path, field, found=repr(value)[:80], expected="true or false")
    return value


def _number(
    section: Mapping[str, Any], name: str, path: Path, low: float = -sys.float_info.max, high: float = sys.float_info.max
) -> float:
    value = section.get(name)
    if type(value) not in (int, float) or not low <= value <= high:
        expected = "a number" if low == -sys.float_info.max else f"a number above 0, from {low:g} to {high:g}"
        raise InvalidField(path, f"router.{name}", found=repr(value)[:80], expected=expected)
    return float(value)


def _top_k(value: object, path: Path, field: str, count: int) -> int | None:
    return None if value is None else require_integer(value, path, field, low=1, high=count)


def _one_of(section: Mapping[str, Any], name: str, path: Path, allowed: tuple[Any, ...], field: str = "router") -> Any:
    value = section.get(name)
    if not isinstance(value, str | None) or value not in allowed:
        expected = f"one of {', '.join('null' if item is None else item for item in allowed)}"
        raise InvalidField(path, f"{field}.{name}", found=repr(value)[:80], expected=expected)
    return value
