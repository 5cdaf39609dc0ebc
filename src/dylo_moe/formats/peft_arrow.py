"""PEFT's Arrow (arXiv 2405.11157): task_<i>/, with GenKnowSub gks_<i>/, and arrow_router/, whose JSON alone is read.

The gates are no file of the checkpoint: PEFT computes them from the experts at the first forward pass, and so does the reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylo_moe.errors import ExpertMissing, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter import (
    check_expert_name,
    check_same_sizes,
    check_targets,
    one_base_model,
    pickled_weights,
    read_adapter,
)
from dylo_moe.formats.adapter_config import AdapterConfig, parse_names
from dylo_moe.formats.checkpoint import Checkpoint, Expert, GatesState, GateState, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.genknowsub import purify
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.patterns import natural_sorted
from dylo_moe.formats.peft_lora import adapter_directories
from dylo_moe.formats.router_file import check_router_values
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "peft-arrow"
ROUTER = "arrow_router"
ITERATIONS = 15
EPSILON = 1e-8
# What torch.Generator.manual_seed takes.
_SEEDS = (-(2**63), 2**64 - 1)
_GENERAL = re.compile(r"gks_[0-9]+")


@dataclass(frozen=True)
class _Routing:
    """The validated arrow_config, with the caller's options in it. file: where it is recorded."""

    file: Path
    experts: tuple[str, ...]
    general: tuple[str, ...]
    top_k: int
    temperature: float
    rng_seed: int


def read_arrow(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a directory that PEFT saved from create_arrow_model, before or after a forward pass.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    routing = _routing(files, options)
    files.assumptions["rng_device"] = "cpu"
    names = (*routing.experts, *routing.general)
    directories = [files.root / name for name in names]
    for name, directory in zip(names, directories, strict=True):
        if not files.exists(directory):
            raise ExpertMissing(directory, "", found="no such directory", expected=f"the files of {name}, as in {ROUTER}")
    files.convert(pickled_weights(files, directories))
    read = [read_adapter(files, directory, name) for name, directory in zip(names, directories, strict=True)]
    _check_plain(config for _, config in read)
    _check_alike(read)
    check_same_sizes([expert for expert, _ in read], files.root)
    _check_routed(files, routing.file, read[0][0])
    adapters = tuple(_widened(expert) for expert, _ in read)
    experts, general = adapters[: len(routing.experts)], adapters[len(routing.experts) :]
    if general:
        experts = purify(files, experts, general, options.genknowsub)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=one_base_model(config for _, config in read),
        experts=experts,
        router=_gates(experts, routing),
        tokenizer=tokenizer_directory(files.root),
    )


def prototype(pair: LoraPair, rng_seed: int) -> Tensor:
    """(in_features,) float32: where the expert's delta acts most, as PEFT 0.21 finds it.

    15 steps of power iteration on (B A)^T (B A) from a seeded normal vector. They do not converge, so the result depends on
    the seed and is not the singular vector; only the same steps give the same gate. PEFT draws on the device of its model, where
    a seed means other numbers: these are the prototypes of a model on a CPU.
    """
    lora_A, lora_B = pair.lora_A.float(), pair.lora_B.float()
    gram = lora_B.T @ lora_B
    vector = torch.randn(lora_A.shape[1], generator=torch.Generator().manual_seed(rng_seed))
    vector = vector / (vector.norm() + EPSILON)
    for _ in range(ITERATIONS):
        image = lora_A.T @ (gram @ (lora_A @ vector))
        vector = image / (image.norm() + EPSILON)
    return vector


def _gates(experts: tuple[Expert, ...], routing: _Routing) -> GatesState:
    gates = {}
    for module in experts[0].modules:
        prototypes = torch.stack([prototype(expert.modules[module], routing.rng_seed) for expert in experts])
        gates[module] = GateState(weight=prototypes, top_k=routing.top_k)
    return GatesState(gates=gates, rule="arrow", num_experts=len(experts), temperature=routing.temperature)


def _routing(files: CheckpointFiles, options: ReadOptions) -> _Routing:
    path = files.root / ROUTER / "adapter_config.json"
    recorded = files.read_json(path).get("arrow_config")
    if not isinstance(recorded, dict):
        raise InvalidField(path, "arrow_config", found=repr(recorded)[:80], expected="Arrow's settings")
    experts = _expert_names(files, recorded, path)
    top_k = recorded.get("top_k") if options.top_k is None else options.top_k
    temperature = recorded.get("router_temperature") if options.temperature is None else options.temperature
    features = options.router_features or GatesState.features
    check_router_values(path, len(experts), top_k=top_k, temperature=temperature, features=features)
    if features != GatesState.features:
        raise InvalidField(path, "features", found=repr(features), expected="'layer': each gate sees its layer's input")
    return _Routing(
        file=path,
        experts=experts,
        general=_general_names(files, recorded, path),
        top_k=top_k,
        temperature=float(temperature),
        rng_seed=_rng_seed(files, recorded.get("rng_seed"), options.rng_seed, path),
    )


def _expert_names(files: CheckpointFiles, recorded: dict[str, Any], path: Path) -> tuple[str, ...]:
    """In numeric order. Adapters that were added to the model later are experts too, though PEFT does not list them."""
    listed = _names(recorded.get("task_adapter_names"), path, "arrow_config.task_adapter_names")
    if not listed or any(_is_no_expert(name) for name in listed):
        expected = "at least one expert's directory, not the router's and no gks_<i>"
        raise InvalidField(path, "arrow_config.task_adapter_names", found=repr(listed)[:80], expected=expected)
    present = [directory.name for directory in adapter_directories(files.root)]
    added = [name for name in present if name not in listed and not _is_no_expert(name)]
    for name in added:
        check_expert_name(name, files.root / name)
        files.warn(f"{name} is an expert though {ROUTER} does not list it: PEFT routes to adapters that were added later")
    return tuple(natural_sorted([*listed, *added]))


def _is_no_expert(name: str) -> bool:
    return name == ROUTER or _GENERAL.fullmatch(name) is not None


def _general_names(files: CheckpointFiles, recorded: dict[str, Any], path: Path) -> tuple[str, ...]:
    used = recorded.get("use_gks")
    if type(used) is not bool:
        raise InvalidField(path, "arrow_config.use_gks", found=repr(used)[:80], expected="true or false")
    if not used:
        ignored = [each.name for each in adapter_directories(files.root) if _GENERAL.fullmatch(each.name)]
        if ignored:
            files.warn(f"{', '.join(ignored)} were not read: use_gks is false")
        return ()
    names = _names(recorded.get("gks_adapter_names"), path, "arrow_config.gks_adapter_names")
    if not names or not all(_GENERAL.fullmatch(name) for name in names):
        expected = "gks_0, gks_1, ..., since use_gks is true"
        raise InvalidField(path, "arrow_config.gks_adapter_names", found=repr(names)[:80], expected=expected)
    return tuple(natural_sorted(names))


def _names(value: object, path: Path, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidField(path, field, found=repr(value)[:80], expected="a list of names")
    for name in value:
        check_expert_name(name, path)
        if value.count(name) > 1:
            raise InvalidField(path, field, found=f"{name!r} twice", expected="each name once")
    return value


def _rng_seed(files: CheckpointFiles, recorded: object, given: int | None, path: Path) -> int:
    field = "arrow_config.rng_seed"
    if recorded is None and given is None:
        expected = "a seed: without one PEFT draws other gates at every load; give the option rng_seed to settle on one"
        raise InvalidField(path, field, found="null", expected=expected)
    for value in (recorded, given):
        if value is not None and (type(value) is not int or not _SEEDS[0] <= value <= _SEEDS[1]):
            raise InvalidField(path, field, found=repr(value)[:80], expected="an integer of at most 64 bits")
    if given is None or given == recorded:
        return recorded
    files.assumptions["rng_seed"] = given
    if recorded is not None:
        files.warn(f"rng_seed {given} was given and used, while {files.relative(path)} records {recorded}")
    return given


def _check_plain(configs: Iterable[AdapterConfig]) -> None:
    """Raises InvalidField for what PEFT's Arrow drops without a word: it runs A, B and the scaling, and nothing else."""
    for config in configs:
        variants = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "modules_to_save": config.saved}
        for field, found in (variants | {"bias": config.bias != "none"}).items():
            if found:
                raise InvalidField(config.file, field, found=repr(found)[:80], expected="none: Arrow routes plain LoRA only")


def _check_alike(read: list[tuple[Expert, AdapterConfig]]) -> None:
    """Raises ShapeMismatch unless all adapters have the same modules and ranks, without which PEFT refuses or fails too."""
    first = read[0][0]
    for expert, config in read[1:]:
        odd = sorted(set(expert.modules) ^ set(first.modules))
        if odd:
            found = f"{odd[0]} in only one of {expert.name} and {first.name}"
            raise ShapeMismatch(config.file, "target_modules", found=found, expected="the same modules in all adapters")
        for module, pair in expert.modules.items():
            if pair.rank != first.modules[module].rank:
                expected = f"{first.modules[module].rank}, as in {first.name}: Arrow needs one rank"
                raise ShapeMismatch(config.file, f"r of {module}", found=pair.rank, expected=expected)


def _check_routed(files: CheckpointFiles, path: Path, expert: Expert) -> None:
    """Raises InvalidField unless the router is on the experts' modules: on others PEFT would run no expert at all."""
    targets = parse_names(files.read_json(path).get("target_modules"), path, "target_modules")
    if targets is None:
        raise InvalidField(path, "target_modules", found="nothing", expected="the modules of the experts")
    check_targets(expert.modules, AdapterConfig(path, None, 0.0, targets=targets))


def _widened(expert: Expert) -> Expert:
    """16-bit tensors become float32 before anything is computed from them, as in PEFT."""
    modules = {name: _widened_pair(pair) for name, pair in expert.modules.items()}
    return Expert(expert.name, modules, expert.targets)


def _widened_pair(pair: LoraPair) -> LoraPair:
    lora_A, lora_B = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (pair.lora_A, pair.lora_B))
    return LoraPair(lora_A, lora_B, pair.alpha, pair.use_rslora)
