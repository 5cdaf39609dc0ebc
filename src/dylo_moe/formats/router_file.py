"""The router's files: router.safetensors; router.pt, flat {gate.weight, gate.bias} or nested {gate_state_dict, top_k, ...}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import (
    ExpertCountMismatch,
    ForeignTensor,
    GateMissing,
    InvalidField,
    NonFiniteTensor,
    ShapeMismatch,
)
from dylo_moe.formats.adapter import check_finite
from dylo_moe.formats.checkpoint import ROUTER_FEATURES, RouterState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import TensorInfo, require_float

# What every DyLoRA-MoE release constructs its router with.
DEFAULT_TOP_K = 1
DEFAULT_TEMPERATURE = 2.0
# Beyond these, logits in float32 become infinite or all alike.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
# Upstream routes on features of a pass with all adapters active, from its second call on.
UPSTREAM_FEATURES = "all_experts"


@dataclass(frozen=True)
class Gate:
    """The gate as a file holds it, and the values that the file records beside it."""

    file: Path
    weight: Tensor
    bias: Tensor
    recorded: Mapping[str, Any]


def read_gate(files: CheckpointFiles, path: Path) -> Gate:
    """Read one router file.

    Raises:
        GateMissing: no gate.weight. ForeignTensor: tensors besides the gate. ShapeMismatch, DtypeUnsupported, NonFiniteTensor.
    """
    if path.suffix == ".safetensors":
        header = files.header(path)
        gate_infos(header, path)
        return gate_from(files.tensors(path), {}, path)
    tree = files.pickle(path)
    if "gate_state_dict" not in tree:
        return gate_from(tree, {}, path)
    state = tree["gate_state_dict"]
    if not isinstance(state, dict):
        raise GateMissing(path, "gate_state_dict", found=type(state).__name__, expected="weight and bias")
    if "expert_maturity" in tree:
        files.warn(f"{files.relative(path)}: expert_maturity is ignored: routing is top-k in evaluation")
    recorded = {key: value for key, value in tree.items() if key not in ("gate_state_dict", "expert_maturity")}
    return gate_from({f"gate.{key}": value for key, value in state.items()}, recorded, path)


def gate_from(tensors: Mapping[str, object], recorded: Mapping[str, Any], file: Path) -> Gate:
    """A Gate from {"gate.weight", "gate.bias"}, checked."""
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ForeignTensor(file, key, found=type(value).__name__, expected="a tensor")
    gate_infos({key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()}, file)
    check_finite(tensors, file)
    return Gate(file, tensors["gate.weight"], tensors["gate.bias"], recorded)


def gate_infos(header: Mapping[str, TensorInfo], file: Path) -> None:
    """Raises unless the header holds exactly gate.weight (experts, hidden) and gate.bias (experts,)."""
    for key, shape in (("gate.weight", "(experts, hidden)"), ("gate.bias", "(experts,)")):
        if key not in header:
            found = f"tensors {', '.join(sorted(header))[:200] or 'none'}"
            raise GateMissing(file, key, found=found, expected=f"{key} {shape}")
    for key, info in header.items():
        if key not in ("gate.weight", "gate.bias"):
            raise ForeignTensor(file, key, found="a tensor", expected="only gate.weight and gate.bias")
        require_float(info, key, file)
    shape = header["gate.weight"].shape
    if len(shape) != 2 or 0 in shape:
        raise ShapeMismatch(file, "gate.weight", found=f"shape {shape}", expected="(experts, hidden)")
    bias = header["gate.bias"]
    if bias.shape == shape[1:] != shape[:1]:
        raise ShapeMismatch(file, "gate.weight", found=f"shape {shape}, transposed", expected=f"{shape[::-1]}, (experts, hidden)")
    if bias.shape != shape[:1]:
        found = f"shape {bias.shape}, while gate.weight has {shape}"
        raise ShapeMismatch(file, "gate.bias", found=found, expected=f"{shape[:1]}")


def router_state(files: CheckpointFiles, gate: Gate, num_experts: int, options: ReadOptions) -> RouterState:
    """The router for `num_experts` experts; what neither the caller nor a file says is assumed and recorded as such."""
    gate_rows(gate, num_experts, gate.recorded.get("input_size"), gate.file)
    recorded = gate.recorded.get("num_experts", num_experts)
    if type(recorded) is not int or recorded != num_experts:
        raise ExpertCountMismatch(gate.file, "num_experts", found=repr(recorded)[:80], expected=num_experts)
    top_k = _choose(files, gate, "top_k", options.top_k, DEFAULT_TOP_K)
    temperature = _choose(files, gate, "temperature", options.temperature, DEFAULT_TEMPERATURE)
    features = _choose(files, gate, "features", options.router_features, UPSTREAM_FEATURES)
    check_router_values(gate.file, num_experts, top_k=top_k, temperature=temperature, features=features)
    return RouterState(gate.weight, gate.bias, features, top_k, float(temperature))


def check_router_values(file: Path, num_experts: int, *, top_k: object, temperature: object, features: object) -> None:
    """Raises InvalidField unless 1 <= top_k <= experts, the temperature is a positive number and the features exist."""
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise InvalidField(file, "top_k", found=repr(top_k)[:80], expected=f"an integer from 1 to {num_experts}")
    if type(temperature) not in (int, float) or isinstance(temperature, float) and math.isnan(temperature):
        raise InvalidField(file, "temperature", found=repr(temperature)[:80], expected="a number above 0")
    if math.isinf(temperature):
        raise NonFiniteTensor(file, "temperature", found=temperature, expected="a finite number above 0")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        expected = f"a number above 0, from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:,.0f}"
        raise InvalidField(file, "temperature", found=temperature, expected=expected)
    if features not in ROUTER_FEATURES:
        raise InvalidField(file, "features", found=repr(features)[:80], expected=f"one of {', '.join(ROUTER_FEATURES)}")


def gate_rows(gate: Gate, num_experts: int, hidden: object, recorded_in: Path) -> None:
    """Raises ExpertCountMismatch or ShapeMismatch unless the gate is (experts, hidden); `hidden` None: not recorded."""
    rows, columns = gate.weight.shape
    if rows != num_experts and columns == num_experts:
        found = f"shape {(rows, columns)}, which is transposed"
        raise ShapeMismatch(gate.file, "gate.weight", found=found, expected=f"shape {(columns, rows)}")
    if rows != num_experts:
        found = f"{rows} rows for {num_experts} experts"
        raise ExpertCountMismatch(gate.file, "gate.weight", found=found, expected="one row per expert")
    if hidden is not None and (type(hidden) is not int or hidden != columns):
        found = f"shape {(rows, columns)}"
        expected = f"{repr(hidden)[:80]} columns, as recorded in {recorded_in.name}"
        raise ShapeMismatch(gate.file, "gate.weight", found=found, expected=expected)


def _choose(files: CheckpointFiles, gate: Gate, name: str, given: object, default: object) -> Any:
    if given is not None:
        return given
    if name in gate.recorded:
        return gate.recorded[name]
    files.assumptions[name] = default
    return default
