"""DyLoRA-MoE with separated experts: peft_adapters/expert_K/... or expert_K.pt, and a router file.

Layouts by release: expert_K.pt (November 2025), expert_K/adapter_config.json (upstream's documentation) and
expert_K/expert_K/adapter_config.json (what upstream's train.py writes). Where several are present, directories win over .pt
and nested ones over flat ones, with a warning.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from dylo_moe.errors import (
    ExpertCountMismatch,
    ExpertEmpty,
    ExpertMissing,
    GateMissing,
    InvalidField,
    MissingFile,
)
from dylo_moe.formats.adapter import (
    build_expert,
    check_pairs,
    flat_tensors,
    infos,
    one_base_model,
    pair_up,
    pickled_weights,
    read_adapter,
)
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.checkpoint import Checkpoint, Expert
from dylo_moe.formats.dylora_config import DyloraConfig, adapter_config, read_dylora_config
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.router_file import read_gate, router_state
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "dylora-separated"
ADAPTERS = "peft_adapters"
_EXPERT = re.compile(r"expert_(0|[1-9][0-9]{0,5})(?P<suffix>\.pt)?")
ROUTER_FILES = ("router.safetensors", "router.pt", "dylo_moe_state/router.pt")


def read_separated(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a directory with peft_adapters/.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = read_dylora_config(files)
    found = _find_experts(files)
    _check_numbers(found, config, files.root / ADAPTERS)
    router = _router_path(files)
    places = [found[number] for number in sorted(found)]
    directories = [place for place in places if place.suffix != ".pt"]
    pickles = [place for place in [*places, router] if place.suffix == ".pt"]
    files.convert([*pickles, *pickled_weights(files, directories)])
    read = [_read_expert(files, place, number, (config, options)) for number, place in enumerate(places)]
    base = one_base_model(adapter for _, adapter in read)
    if base and config.base_model and base != config.base_model:
        files.warn(f"config.json records the base model {config.base_model!r}, the experts {base!r}; the experts' is used")
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=base or config.base_model,
        experts=tuple(expert for expert, _ in read),
        router=router_state(files, read_gate(files, router), len(read), options),
        base_config=config.base_config,
        tokenizer=tokenizer_directory(files.root),
    )


def _find_experts(files: CheckpointFiles) -> dict[int, Path]:
    """Expert number -> the adapter's directory or .pt file."""
    directory = files.root / ADAPTERS
    if not directory.is_dir():
        raise MissingFile(directory, "", found="no directory", expected="expert_0, expert_1, ...")
    found: dict[int, Path] = {}
    for entry in entries(directory):
        match = _EXPERT.fullmatch(entry.name)
        is_expert_like = entry.is_dir() or entry.suffix == ".pt"
        if match is None and is_expert_like:
            raise InvalidField(entry, "", found=f"the name {entry.name!r}", expected="expert_0, expert_1, ...")
        if match is None or not is_expert_like:
            continue
        number = int(match[1])
        if match["suffix"] and number in found:
            files.warn(f"{files.relative(found[number])}: the directory was read, {entry.name} was not")
        elif entry.is_dir():
            found[number] = _adapter_directory(files, entry)
        else:
            found[number] = entry
    return found


def _adapter_directory(files: CheckpointFiles, directory: Path) -> Path:
    nested = directory / directory.name
    is_nested, is_flat = nested.is_dir(), files.exists(directory / "adapter_config.json")
    if is_nested and is_flat:
        files.warn(f"{files.relative(nested)} was read, {files.relative(directory)}/adapter_config.json was not")
    if not is_nested and not entries(directory):
        raise ExpertMissing(directory, "", found="an empty directory", expected="an adapter")
    return nested if is_nested else directory


def _check_numbers(found: dict[int, Path], config: DyloraConfig, directory: Path) -> None:
    if not found:
        raise ExpertMissing(directory, "", found="no experts", expected="expert_0, expert_1, ...")
    count = config.num_experts if config.num_experts is not None else max(found) + 1
    source = f"{count} experts" + (" of config.json" if config.num_experts is not None else "")
    for number in range(min(count, max(found) + 2)):
        if number not in found:
            raise ExpertMissing(directory / f"expert_{number}", "", found="no files", expected=source)
    if len(found) != count:
        raise ExpertCountMismatch(directory, "", found=f"{len(found)} experts", expected=source)


def _read_expert(
    files: CheckpointFiles, place: Path, number: int, settings: tuple[DyloraConfig, ReadOptions]
) -> tuple[Expert, AdapterConfig]:
    name = f"expert_{number}"
    if place.suffix != ".pt":
        return read_adapter(files, place, name)
    config = adapter_config(*settings, files)
    tensors = flat_tensors(files.pickle(place), place)
    if not tensors:
        raise ExpertEmpty(place, name, found="0 tensors", expected="pairs of lora_A and lora_B")
    pairs = check_pairs(pair_up(infos(tensors), name, place), config, place)
    return with_own_targets(build_expert(name, pairs, tensors, config, place)), config


def with_own_targets(expert: Expert) -> Expert:
    """DyLoRA-MoE wraps a module in every layer or in none, so the paths below the layers' numbers are the target names."""
    return replace(expert, targets=tuple(sorted({_below_layer(module) for module in expert.modules})))


def _below_layer(module: str) -> str:
    """ "model.layers.0.self_attn.q_proj" -> "self_attn.q_proj"; a path without a number stays whole."""
    return re.split(r"(?:^|\.)[0-9]+\.", module)[-1]


def _router_path(files: CheckpointFiles) -> Path:
    present = [files.root / name for name in ROUTER_FILES if files.exists(files.root / name)]
    if not present:
        expected = f"one of {', '.join(ROUTER_FILES)}"
        raise GateMissing(files.root, "gate.weight", found="no router file", expected=expected)
    for other in present[1:]:
        files.warn(f"{files.relative(present[0])} was read, {files.relative(other)} was not")
    return present[0]
