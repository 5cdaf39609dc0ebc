"""LoRA mixtures with one gate per Linear, all in one state dict: sorted, checked from headers, turned into experts and gates.

Shared by mergoo, LoRAMoE, HydraLoRA, MoLA and AdaMoLE. Each of them says what its keys mean; the checks are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from dylo_moe.errors import (
    ExpertCountMismatch,
    ExpertEmpty,
    ExpertMissing,
    ForeignTensor,
    GateMissing,
    IncompletePair,
    InvalidField,
    ShapeMismatch,
)
from dylo_moe.formats.adapter import Half, build_expert, check_finite, check_pairs, flat_tensors, infos, weights_file
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.checkpoint import Expert, GateState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import TensorInfo, require_float

MAX_EXPERTS = 4_096
GATE, THRESHOLD, THRESHOLD_BIAS = "gate", "threshold", "threshold bias"


@dataclass(frozen=True)
class Part:
    """What one tensor is. kind: "A", "B", GATE, THRESHOLD or THRESHOLD_BIAS; expert: None for a gate or for a half that all
    experts of the module share."""

    module: str
    kind: str
    expert: int | None = None


@dataclass
class Unit:
    """The tensors of one Linear: both halves of each expert, and those of its gate by kind."""

    experts: dict[int, dict[str, Half]] = field(default_factory=dict)
    gate: dict[str, Half] = field(default_factory=dict)
    shared: dict[str, Half] = field(default_factory=dict)


@dataclass(frozen=True)
class GatedState:
    """Sorted and checked tensors. units: by module, in the file's order; adapters: rank and alpha of each expert."""

    file: Path
    units: Mapping[str, Unit]
    adapters: tuple[AdapterConfig, ...]

    @property
    def num_experts(self) -> int:
        return max(len(unit.experts) for unit in self.units.values())


def adapter_header(files: CheckpointFiles) -> tuple[Path, dict[str, TensorInfo], Callable[[], dict[str, Tensor]]]:
    """The file with the adapter's weights, its header, and what reads its tensors; a pickle has no header and is read now."""
    path = weights_file(files, files.root)
    if path.suffix == ".safetensors":
        return path, files.header(path), lambda: files.tensors(path)
    tensors = flat_tensors(files.pickle(path), path)
    return path, infos(tensors), lambda: tensors


def sort_units(header: Mapping[str, TensorInfo], meaning: Callable[[str], Part | None], file: Path) -> dict[str, Unit]:
    """module -> its tensors.

    Raises:
        ExpertEmpty: no tensors. ForeignTensor: a key without meaning, or a second key with the same one.
    """
    if not header:
        raise ExpertEmpty(file, "", found="0 tensors", expected="pairs of lora_A and lora_B, and gates")
    units: dict[str, Unit] = {}
    for key, info in header.items():
        part = meaning(key)
        if part is None:
            expected = "only lora_A, lora_B and gate weights"
            raise ForeignTensor(file, key, found="a tensor that belongs to no expert and no gate", expected=expected)
        _place(units.setdefault(part.module, Unit()), part, Half(key, info), file)
    for unit in units.values():
        for halves in unit.experts.values():
            for kind, half in unit.shared.items():
                halves.setdefault(kind, half)
    return units


def _place(unit: Unit, part: Part, half: Half, file: Path) -> None:
    if part.kind not in ("A", "B"):
        place = unit.gate
    else:
        place = unit.shared if part.expert is None else unit.experts.setdefault(part.expert, {})
    if part.kind in place:
        raise ForeignTensor(file, half.key, found="the same tensor under two keys", expected="one")
    place[part.kind] = half


def check_units(
    units: Mapping[str, Unit],
    adapters: Callable[[int], AdapterConfig],
    file: Path,
    *,
    gate: str,
    recorded: tuple[int, Path, str] | None,
) -> GatedState:
    """Every number, pair and gate, from the headers alone.

    Args:
        adapters: expert's number -> its rank, alpha and target modules.
        gate: name of a gate's tensor, for messages.
        recorded: number of experts of every module, the file and the field that record it; None where modules may differ.

    Raises:
        ExpertMissing, ExpertCountMismatch, IncompletePair, ShapeMismatch, GateMissing, DtypeUnsupported, InvalidField.
    """
    for module, unit in units.items():
        _check_numbers(module, unit, file)
        if recorded is not None and len(unit.experts) != recorded[0]:
            expected = f"{recorded[0]}, the {recorded[2]} of {recorded[1].name}"
            raise ExpertCountMismatch(file, module, found=f"{len(unit.experts)} experts", expected=expected)
    configs = []
    for number in range(max(len(unit.experts) for unit in units.values())):
        pairs, config = _pairs_of(units, number), adapters(number)
        if len(pairs) < len(units):  # a higher layer's expert need not be on every target module
            config = replace(config, targets=None)
        check_pairs(pairs, config, file)
        configs.append(config)
    for module, unit in units.items():
        _check_gate(module, unit, file, gate)
    return GatedState(file, units, tuple(configs))


def _check_numbers(module: str, unit: Unit, file: Path) -> None:
    if not unit.experts:
        key = next(half.key for half in (*unit.shared.values(), *unit.gate.values()))
        raise IncompletePair(file, key, found=f"no expert on {module}", expected="its lora_A and lora_B")
    count = len(unit.experts)
    if max(unit.experts) >= MAX_EXPERTS:
        raise InvalidField(file, module, found=f"expert {max(unit.experts)}", expected=f"numbers below {MAX_EXPERTS:,}")
    for number in range(count):
        if number not in unit.experts:
            expected = f"its tensors, since there are tensors of expert {max(unit.experts)}"
            raise ExpertMissing(file, f"{module}: expert {number}", found="no tensors", expected=expected)


def _pairs_of(units: Mapping[str, Unit], number: int) -> dict[str, dict[str, Half]]:
    return {module: unit.experts[number] for module, unit in units.items() if number in unit.experts}


def _check_gate(module: str, unit: Unit, file: Path, name: str) -> None:
    experts, inputs = len(unit.experts), unit.experts[0]["A"].info.shape[1]
    if GATE not in unit.gate:
        raise GateMissing(file, f"{module}.{name}", found="no such tensor", expected=f"a gate {(experts, inputs)}")
    wanted = {GATE: (experts, inputs), THRESHOLD: (1, inputs), THRESHOLD_BIAS: (1,)}
    for kind, half in unit.gate.items():
        require_float(half.info, half.key, file)
        shape = half.info.shape
        if kind == GATE and len(shape) == 2 and shape[1] == inputs and shape[0] != experts:
            found = f"{shape[0]} rows for {experts} experts"
            raise ExpertCountMismatch(file, half.key, found=found, expected="one row per expert")
        if shape != wanted[kind]:
            note = ", transposed" if shape == wanted[kind][::-1] else ""
            raise ShapeMismatch(file, half.key, found=f"shape {shape}{note}", expected=f"{wanted[kind]}")


def build_experts(state: GatedState, tensors: Mapping[str, Tensor]) -> tuple[Expert, ...]:
    """expert_0, expert_1 ... Raises NonFiniteTensor naming the tensor."""
    return tuple(
        build_expert(f"expert_{number}", _pairs_of(state.units, number), tensors, adapter, state.file)
        for number, adapter in enumerate(state.adapters)
    )


def build_gates(state: GatedState, tensors: Mapping[str, Tensor], top_k: Callable[[str], int | None]) -> dict[str, GateState]:
    """module -> its gate. Raises NonFiniteTensor naming the tensor."""
    gates = {}
    for module, unit in state.units.items():
        own = {kind: tensors[half.key] for kind, half in unit.gate.items()}
        check_finite({unit.gate[kind].key: tensor for kind, tensor in own.items()}, state.file)
        gates[module] = GateState(
            weight=own[GATE],
            top_k=top_k(module),
            threshold_weight=own.get(THRESHOLD),
            threshold_bias=own.get(THRESHOLD_BIAS),
        )
    return gates


def check_top_k(value: object, count: int, file: Path) -> int:
    """One number of experts per token. Raises InvalidField unless it is an integer from 1 to `count`."""
    if type(value) is not int or not 1 <= value <= count:
        raise InvalidField(file, "top_k", found=repr(value)[:80], expected=f"an integer from 1 to {count}")
    return value


def refuse_options(options: ReadOptions, file: Path, names: Iterable[str] = ("temperature", "router_features")) -> None:
    """Raises InvalidField for a caller's option that the gates of this format do not know."""
    for name in names:
        given = getattr(options, name)
        if given is not None and (name, given) != ("router_features", "layer"):
            raise InvalidField(file, name, found=repr(given)[:80], expected="no such option: these gates have none")


def layer_number(module: str) -> int | None:
    """The layer that a module's path names: its first number."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)
