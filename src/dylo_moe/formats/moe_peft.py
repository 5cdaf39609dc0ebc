"""MoE-PEFT (github.com/TUDB-Labs/MoE-PEFT 2.0.2) and the mixlora package: MixLoRA, LoRAMoE and MoLA in one LoRA directory.

Keys, P the format's prefix, N the layer, M a Linear's name, E the expert:
    P.layers.N.mlp.M.experts.E.lora_{A,B}.weight          an expert (MoLA: on self_attn too)
    P.layers.N.self_attn.M.lora_{A,B}.weight              the one LoRA on the attention, which is always added (not MoLA)
    P.layers.N.mlp.moe_gate.weight                        MixLoRA: one gate per feed-forward block
    P.layers.N.<block>.M.moe_gate.weight                  LoRAMoE, MoLA: one gate per Linear
mixlora's first releases ("mixtral"): mixlora.layers.N.gate.weight, mixlora.layers.N.experts.E.M.lora_{A,B}.weight.

All architectures that MoE-PEFT knows have their layers below "model." in transformers, but for ChatGLM, which is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dylo_moe.errors import ExpertCountMismatch, ExpertEmpty, ForeignTensor, GateMissing, IncompletePair, ShapeMismatch
from dylo_moe.formats.adapter import (
    Half,
    Pairs,
    build_expert,
    check_finite,
    check_pairs,
    flat_tensors,
    infos,
    weights_file,
)
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.checkpoint import Checkpoint, GatesState, GateState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.moe_peft_config import LEGACY_NAMES, LORAMOE, MIXLORA, MOLA, MoePeftConfig, read_moe_peft_config
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import TensorInfo, require_float
from dylo_moe.formats.switch import warn_of_switch
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMATS = {"mixlora": MIXLORA, "moe-peft-loramoe": LORAMOE, "moe-peft-mola": MOLA}
SHARED = "shared"
_NUMBER = r"(?:0|[1-9][0-9]{0,4})"
_LORA = re.compile(
    rf"(?P<module>layers\.{_NUMBER}\.(?:self_attn|mlp)\.\w+)(?:\.experts\.(?P<expert>{_NUMBER}))?\.lora_(?P<half>[AB])\.weight"
)
_GATE = re.compile(rf"(?P<unit>layers\.{_NUMBER}\.(?:self_attn|mlp)(?:\.\w+)?)\.moe_gate\.weight")
_LEGACY_GATE = re.compile(rf"(layers\.{_NUMBER})\.gate\.weight")
_LEGACY_LORA = re.compile(rf"(layers\.{_NUMBER})\.experts\.({_NUMBER})\.(\w+)\.(lora_[AB]\.weight)")
# Linears that lead back to the hidden size; the others of a feed-forward block start from it.
_BACK = ("down_proj", "fc2", "dense_4h_to_h")


@dataclass
class Parts:
    """The keys of a file, sorted. gates: unit -> its gate; experts: number -> its pairs."""

    experts: dict[int, Pairs] = field(default_factory=dict)
    shared: Pairs = field(default_factory=dict)
    gates: dict[str, Half] = field(default_factory=dict)


def read_mixlora(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """MixLoRA: whole feed-forward blocks are mixed."""
    return _read(files, options, "mixlora")


def read_moe_peft_loramoe(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """MoE-PEFT's LoRAMoE: all experts of each Linear of the feed-forward blocks."""
    return _read(files, options, "moe-peft-loramoe")


def read_moe_peft_mola(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """MoE-PEFT's MoLA: the top_k experts of each Linear."""
    return _read(files, options, "moe-peft-mola")


def _read(files: CheckpointFiles, options: ReadOptions, name: str) -> Checkpoint:
    """Raises any CheckpointError, naming file and field."""
    config = read_moe_peft_config(files, files.root / "adapter_config.json", FORMATS[name], options)
    path = weights_file(files, files.root)
    if path.suffix == ".safetensors":
        parts = _checked(files.header(path), config, path)
        tensors = files.tensors(path)
    else:
        tensors = flat_tensors(files.pickle(path), path)
        parts = _checked(infos(tensors), config, path)
    return Checkpoint(
        path=files.root,
        format=name,
        base_model=config.base_model,
        experts=tuple(
            build_expert(f"expert_{e}", parts.experts[e], tensors, config.experts, path) for e in sorted(parts.experts)
        ),
        router=_gates(parts, tensors, config, files, path),
        shared=build_expert(SHARED, parts.shared, tensors, config.shared, path) if parts.shared else None,
        tokenizer=tokenizer_directory(files.root),
    )


def _gates(parts: Parts, tensors: Mapping[str, Tensor], config: MoePeftConfig, files: CheckpointFiles, file: Path) -> GatesState:
    check_finite({half.key: tensors[half.key] for half in parts.gates.values()}, file)
    mixing = config.mixing
    state = GatesState(
        gates={unit: GateState(tensors[half.key].to(torch.float32), top_k=mixing.top_k) for unit, half in parts.gates.items()},
        rule=mixing.rule,
        num_experts=config.num_experts,
        level=mixing.level,
        temperature=mixing.temperature,
        threshold=mixing.threshold,
        activation=mixing.activation,
        mixlora_switch=mixing.mixlora_switch,
        expert_capacity=mixing.expert_capacity,
    )
    warn_of_switch(state, files)
    return state


def _checked(header: Mapping[str, TensorInfo], config: MoePeftConfig, file: Path) -> Parts:
    """The sorted keys, once names, numbers and shapes are known to fit each other and the configuration."""
    parts = _sort(header, config, file)
    _check_experts(parts, config, file)
    for pairs in parts.experts.values():
        check_pairs(pairs, _with_present(config.experts, pairs), file)
    if parts.shared:
        check_pairs(parts.shared, _with_present(config.shared, parts.shared), file)
    elif config.shared.targets:
        found = f"no tensor of {', '.join(config.shared.targets)}, which target_modules names"
        raise IncompletePair(file, "self_attn", found=found, expected="their lora_A and lora_B")
    _check_layers(parts, file)
    _check_gates(parts, config, file)
    return parts


def _with_present(config: AdapterConfig, pairs: Pairs) -> AdapterConfig:
    """With the targets that have tensors: MoE-PEFT lists what the user asked for, also where the base has no such Linear.

    A target without tensors is compared with the base, where that is at hand.
    """
    present = {module.rpartition(".")[2] for module in pairs}
    return replace(config, targets=tuple(name for name in config.targets if name in present))


def _sort(header: Mapping[str, TensorInfo], config: MoePeftConfig, file: Path) -> Parts:
    if not header:
        raise ExpertEmpty(file, "", found="0 tensors", expected="experts and gates")
    parts = Parts()
    for key, info in header.items():
        name = _modern(key, config) if config.is_legacy else key
        inner = name.removeprefix(f"{config.prefix}.") if name.startswith(f"{config.prefix}.") else ""
        lora, gate = _LORA.fullmatch(inner), _GATE.fullmatch(inner)
        if lora is None and gate is None:
            expected = f"only experts, gates and LoRAs below {config.prefix}.layers"
            raise ForeignTensor(file, key, found="a tensor that belongs to none of them", expected=expected)
        if gate is not None:
            place, slot = parts.gates, f"model.{gate['unit']}"
        else:
            pairs = parts.shared if lora["expert"] is None else parts.experts.setdefault(int(lora["expert"]), {})
            place, slot = pairs.setdefault(f"model.{lora['module']}", {}), lora["half"]
        if slot in place:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        place[slot] = Half(key, info)
    return parts


def _modern(key: str, config: MoePeftConfig) -> str:
    inner = key.removeprefix(f"{config.prefix}.")
    if match := _LEGACY_GATE.fullmatch(inner):
        return f"{config.prefix}.{match[1]}.mlp.moe_gate.weight"
    if match := _LEGACY_LORA.fullmatch(inner):
        layer, expert, module, rest = match.groups()
        return f"{config.prefix}.{layer}.mlp.{LEGACY_NAMES.get(module, module)}.experts.{expert}.{rest}"
    return key


def _check_experts(parts: Parts, config: MoePeftConfig, file: Path) -> None:
    if not parts.experts:
        raise ExpertEmpty(file, "experts", found="no tensors of an expert", expected="lora_A and lora_B of every expert")
    if set(parts.experts) != set(range(config.num_experts)):
        found = f"experts {', '.join(str(e) for e in sorted(parts.experts)[:12])}"
        expected = f"0 to {config.num_experts - 1}, since num_experts of {config.file.name} is {config.num_experts}"
        raise ExpertCountMismatch(file, "experts", found=found, expected=expected)
    modules = _union(parts.experts.values())
    for number, pairs in sorted(parts.experts.items()):
        for module in modules:
            if module not in pairs:
                expected = "a pair, since other experts have one"
                raise IncompletePair(file, f"{module}.experts.{number}", found="no tensor", expected=expected)


def _union(groups: Iterable[Pairs]) -> list[str]:
    return list(dict.fromkeys(module for pairs in groups for module in pairs))


def _check_layers(parts: Parts, file: Path) -> None:
    """Every layer from 0 on has the same Linears: MoE-PEFT adapts each layer alike."""
    by_layer: dict[int, set[str]] = {}
    for module in [*parts.experts[0], *parts.shared]:
        _, _, number, rest = module.split(".", 3)
        by_layer.setdefault(int(number), set()).add(rest)
    everywhere = set().union(*by_layer.values())
    for number in range(len(by_layer)):
        for rest in sorted(everywhere - by_layer.get(number, set())):
            found = "no tensor, although other layers have one"
            raise IncompletePair(file, f"layers.{number}.{rest}", found=found, expected="the same Linears in every layer")


def _check_gates(parts: Parts, config: MoePeftConfig, file: Path) -> None:
    units: dict[str, list[str]] = {}
    for module in parts.experts[0]:
        unit = module.rpartition(".")[0] if config.mixing.level == "feed_forward" else module
        units.setdefault(unit, []).append(module)
    for unit in units:
        if unit not in parts.gates:
            key = f"{config.prefix}.{unit.removeprefix('model.')}.moe_gate.weight"
            raise GateMissing(file, key, found="no such tensor", expected="the gate of these experts")
    for unit, half in parts.gates.items():
        if unit not in units:
            raise ForeignTensor(file, half.key, found="a gate where there are no experts", expected="gates of the experts")
        _check_gate(half, [parts.experts[0][module] for module in units[unit]], units[unit], config, file)


def _check_gate(half: Half, pairs: list[dict[str, Half]], modules: list[str], config: MoePeftConfig, file: Path) -> None:
    require_float(half.info, half.key, file)
    for pair, module in zip(pairs, modules, strict=True):
        goes_back = config.mixing.level == "feed_forward" and module.endswith(_BACK)
        width = pair["B"].info.shape[0] if goes_back else pair["A"].info.shape[1]
        if half.info.shape != (config.num_experts, width):
            found = f"shape {half.info.shape}"
            expected = f"{(config.num_experts, width)}, (experts, inputs) as {module} has them"
            raise ShapeMismatch(file, half.key, found=found, expected=expected)
