"""One LoRA adapter: tensors and configuration -> Expert. The modules come from the tensors, never from the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dylo_moe.errors import (
    ExpertEmpty,
    ForeignTensor,
    IncompletePair,
    InvalidField,
    MissingFile,
    NonFiniteTensor,
    ShapeMismatch,
)
from dylo_moe.formats.adapter_config import AdapterConfig, read_adapter_config
from dylo_moe.formats.checkpoint import Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.patterns import ends_with
from dylo_moe.formats.safetensors_file import TensorInfo, require_float

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_PREFIXES = ("foundation_model.", "base_model.model.")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True)
class Half:
    """Where one half of a pair lies: its key in the file, dtype and shape."""

    key: str
    info: TensorInfo


Pairs = dict[str, dict[str, Half]]


def read_adapter(files: CheckpointFiles, directory: Path, name: str) -> tuple[Expert, AdapterConfig]:
    """Read adapter_config.json and adapter_model.safetensors (or .bin) of one directory.

    Raises:
        MissingFile, UnreadableFile, InvalidField: the files or the configuration.
        ExpertEmpty, ForeignTensor, IncompletePair, ShapeMismatch, DtypeUnsupported, NonFiniteTensor: the tensors.
    """
    check_expert_name(name, directory)
    config = read_adapter_config(files, directory / "adapter_config.json")
    path = weights_file(files, directory)
    if path.suffix == ".safetensors":
        header = files.header(path)
        pairs = check_pairs(pair_up(header, name, path), config, path)
        tensors = files.tensors(path)
    else:
        tensors = flat_tensors(files.pickle(path), path)
        pairs = check_pairs(pair_up(infos(tensors), name, path), config, path)
    return build_expert(name, pairs, tensors, config, path), config


def weights_file(files: CheckpointFiles, directory: Path) -> Path:
    """adapter_model.safetensors, else adapter_model.bin; with both, safetensors is read and a warning says so."""
    safe, pickled = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    if files.exists(safe):
        if files.exists(pickled):
            files.warn(f"{files.relative(directory)}: adapter_model.safetensors was read, adapter_model.bin was not")
        return safe
    if files.exists(pickled):
        files.warn(f"{files.relative(directory)}: adapter_model.bin, a pickle, was read; safetensors would be safer")
        return pickled
    raise MissingFile(safe, "", found="no such file", expected="the expert's weights")


def pickled_weights(files: CheckpointFiles, directories: Iterable[Path]) -> list[Path]:
    """The adapter_model.bin of each directory that has no adapter_model.safetensors."""
    found = []
    for directory in directories:
        path = directory / "adapter_model.bin"
        if files.exists(path) and not files.exists(path.with_suffix(".safetensors")):
            found.append(path)
    return found


def check_expert_name(name: str, where: Path) -> None:
    """An expert's name becomes a directory and a key of a ModuleDict: letters, digits, - and _ only."""
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
        expected = "letters, digits, - and _, and no method of a ModuleDict"
        raise InvalidField(where, "name", found=repr(name)[:80], expected=expected)


def module_of(key: str) -> str:
    """The path in the base model: without the prefixes of PEFT and of DyLoRA-MoE."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def flat_tensors(tree: Mapping[str, object], file: Path) -> dict[str, Tensor]:
    """A flat state dict; anything that is not a tensor is refused."""
    for key, value in tree.items():
        if not isinstance(value, Tensor):
            raise ForeignTensor(file, key, found=type(value).__name__, expected="a flat dict of tensors")
    return dict(tree)


def pair_up(header: Mapping[str, TensorInfo], name: str, file: Path) -> Pairs:
    """module -> {"A": half, "B": half}; every tensor must be one half of a pair of the expert `name`."""
    if not header:
        raise ExpertEmpty(file, name, found="0 tensors", expected="pairs of lora_A and lora_B")
    pairs: Pairs = {}
    for key, info in header.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None or match["adapter"] not in (None, name) or "base_layer" in key.split("."):
            expected = f"only lora_A and lora_B weights of {name}"
            raise ForeignTensor(file, key, found="a tensor that does not belong to this expert", expected=expected)
        halves = pairs.setdefault(module_of(match["module"]), {})
        if match["half"] in halves:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        halves[match["half"]] = Half(key, info)
    return pairs


def check_pairs(pairs: Pairs, config: AdapterConfig, file: Path) -> Pairs:
    """Headers against each other and against the configuration, before any tensor is read; returns `pairs`."""
    for module, halves in pairs.items():
        if len(halves) != 2:
            (half,) = halves.values()
            missing = "lora_B" if "A" in halves else "lora_A"
            raise IncompletePair(file, half.key, found=f"no {missing}", expected="both halves of the pair")
        _check_shapes(halves["A"], halves["B"], file)
        rank, wanted = halves["A"].info.shape[0], config.rank_of(module)
        if wanted is not None and rank != wanted:
            raise ShapeMismatch(file, halves["A"].key, found=f"rank {rank}", expected=f"rank {wanted} of {config.file.name}")
    _check_targets(pairs, config)
    return pairs


def _check_shapes(half_a: Half, half_b: Half, file: Path) -> None:
    for half in (half_a, half_b):
        require_float(half.info, half.key, file)
        if len(half.info.shape) != 2 or 0 in half.info.shape:
            raise ShapeMismatch(file, half.key, found=f"shape {half.info.shape}", expected="two sizes above 0")
    if half_a.info.shape[0] != half_b.info.shape[1]:
        found = f"shape {half_b.info.shape}, while lora_A has {half_a.info.shape}"
        raise ShapeMismatch(file, half_b.key, found=found, expected="the same rank in both")


def _check_targets(pairs: Pairs, config: AdapterConfig) -> None:
    for module in pairs:
        if not config.covers(module):
            found = f"{str(config.targets)[:200]}, which does not cover the tensors of {module}"
            raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")
    if isinstance(config.targets, tuple):
        for name in config.targets:
            if not any(ends_with(module, name) for module in pairs):
                found = f"{name!r}, for which there is no tensor"
                raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")


def build_expert(name: str, pairs: Pairs, tensors: Mapping[str, Tensor], config: AdapterConfig, file: Path) -> Expert:
    """The expert, once every tensor of it is known to be finite."""
    modules = {}
    for module, halves in pairs.items():
        keys = halves["A"].key, halves["B"].key
        check_finite({key: tensors[key] for key in keys}, file)
        modules[module] = LoraPair(tensors[keys[0]], tensors[keys[1]], config.alpha_of(module), config.use_rslora)
    return Expert(name, modules, config.names_for_every_layer)


def check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises NonFiniteTensor naming the first tensor with a NaN or an infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteTensor(file, key, found=f"{count} values that are NaN or infinite", expected="finite values")


def check_same_sizes(experts: Iterable[Expert], path: Path) -> None:
    """Raises ShapeMismatch when two experts adapt one module with different sizes: they belong to different base models."""
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for expert in experts:
        for module, pair in expert.modules.items():
            sizes = (pair.lora_A.shape[1], pair.lora_B.shape[0])
            first, wanted = seen.setdefault(module, (expert.name, sizes))
            if sizes != wanted:
                found = f"from {sizes[0]} to {sizes[1]}"
                expected = f"from {wanted[0]} to {wanted[1]}, as in {first}"
                raise ShapeMismatch(path, f"{expert.name}: {module}", found=found, expected=expected)


def one_base_model(configs: Iterable[AdapterConfig]) -> str | None:
    """The base model that the adapters record; InvalidField when two of them record different ones."""
    recorded = [(config.base_model, config.file) for config in configs if config.base_model is not None]
    for base, file in recorded[1:]:
        if base != recorded[0][0]:
            expected = f"{recorded[0][0]!r}, as in {recorded[0][1]}"
            raise InvalidField(file, "base_model_name_or_path", found=repr(base), expected=expected)
    return recorded[0][0] if recorded else None
