"""One LoRA adapter: tensors and configuration -> Expert. The modules come from the tensors, never from the configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dylo_moe.errors import (
    ExpertEmpty,
    ForeignTensor,
    IncompletePair,
    InvalidField,
    MissingFile,
    ShapeMismatch,
)
from dylo_moe.formats.adapter_config import AdapterConfig, read_adapter_config
from dylo_moe.formats.beside import add_beside, split_beside
from dylo_moe.formats.checkpoint import Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.patterns import ends_with, module_of
from dylo_moe.formats.safetensors_file import TensorInfo, check_finite, require_float

# What a tensor of an adapter is, by the end of its key; PEFT's files leave the adapter's name out.
_LORA_KEYS = {
    "A": re.compile(r"(?P<module>.+)\.lora_A(?:\.(?P<adapter>[^.]+))?\.weight"),
    "B": re.compile(r"(?P<module>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.weight"),
    "bias": re.compile(r"(?P<module>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias"),
    "magnitude": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"),
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True)
class Half:
    """Where one tensor of a pair lies: its key in the file, dtype and shape."""

    key: str
    info: TensorInfo


# module -> {"A", "B" and, with DoRA and lora_bias, "magnitude" and "bias"}
Pairs = dict[str, dict[str, Half]]


def read_adapter(files: CheckpointFiles, directory: Path, name: str) -> tuple[Expert, AdapterConfig]:
    """Read adapter_config.json and adapter_model.safetensors (or .bin) of one directory.

    Raises:
        MissingFile, UnreadableFile, InvalidField: the files or the configuration.
        ExpertEmpty, ForeignTensor, IncompletePair, ShapeMismatch, DtypeUnsupported, NonFiniteTensor: the tensors.
    """
    check_expert_name(name, directory)
    config = read_adapter_config(files, directory / "adapter_config.json")
    header, tensors, path = open_weights(files, directory)
    header, beside = split_beside(header, config, path)
    pairs = check_pairs(pair_up(header, name, path), config, path)
    read = tensors()
    return add_beside(build_expert(name, pairs, read, config, path), beside, read, path), config


def open_weights(files: CheckpointFiles, directory: Path) -> tuple[dict[str, TensorInfo], Callable[[], dict[str, Tensor]], Path]:
    """The header of an adapter's weights, what reads its tensors, and the file; a pickle has no header and is read now."""
    path = weights_file(files, directory)
    if path.suffix == ".safetensors":
        return files.header(path), lambda: files.tensors(path), path
    tensors = flat_tensors(files.pickle(path), path)
    return infos(tensors), lambda: tensors, path


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
        part, match = _part_of(key)
        if match is None or match["adapter"] not in (None, name) or "base_layer" in key.split("."):
            expected = f"only lora_A and lora_B weights of {name}"
            raise ForeignTensor(file, key, found="a tensor that does not belong to this expert", expected=expected)
        parts = pairs.setdefault(module_of(match["module"]), {})
        if part in parts:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        parts[part] = Half(key, info)
    return pairs


def _part_of(key: str) -> tuple[str, re.Match[str] | None]:
    for part, pattern in _LORA_KEYS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            return part, match
    return "", None


def check_pairs(pairs: Pairs, config: AdapterConfig, file: Path) -> Pairs:
    """Headers against each other and against the configuration, before any tensor is read; returns `pairs`."""
    for module, parts in pairs.items():
        for half, other in (("A", "lora_B"), ("B", "lora_A")):
            if half in parts and other[-1] not in parts:
                raise IncompletePair(file, parts[half].key, found=f"no {other}", expected="both halves of the pair")
        _check_variant(module, parts, config, file)
        _check_shapes(parts, file)
        rank, wanted = parts["A"].info.shape[0], config.rank_of(module)
        if wanted is not None and rank != wanted:
            raise ShapeMismatch(file, parts["A"].key, found=f"rank {rank}", expected=f"rank {wanted} of {config.file.name}")
    check_targets(pairs, config)
    return pairs


def _check_variant(module: str, parts: Mapping[str, Half], config: AdapterConfig, file: Path) -> None:
    """Magnitudes and biases are there when, and only when, the configuration says so."""
    for part, field, wanted in (("magnitude", "use_dora", config.use_dora), ("bias", "lora_bias", config.lora_bias)):
        if wanted and part not in parts:
            raise InvalidField(config.file, field, found=f"true, and no {part} for {module}", expected="one for every pair")
        if part in parts and not wanted:
            found = f"a {part}, although {config.file.name} has no {field}"
            raise ForeignTensor(file, parts[part].key, found=found, expected=f"{field}: true")
    if "A" not in parts:
        key = next(iter(parts.values())).key
        raise IncompletePair(file, key, found="no lora_A and no lora_B", expected="both halves of the pair")


def _check_shapes(parts: Mapping[str, Half], file: Path) -> None:
    for part, half in parts.items():
        require_float(half.info, half.key, file)
        dimensions = 2 if part in ("A", "B") else 1
        if len(half.info.shape) != dimensions or 0 in half.info.shape:
            expected = "two sizes above 0" if dimensions == 2 else "one size above 0"
            raise ShapeMismatch(file, half.key, found=f"shape {half.info.shape}", expected=expected)
    lora_a, lora_b = parts["A"], parts["B"]
    if lora_a.info.shape[0] != lora_b.info.shape[1]:
        found = f"shape {lora_b.info.shape}, while lora_A has {lora_a.info.shape}"
        raise ShapeMismatch(file, lora_b.key, found=found, expected="the same rank in both")
    for part in ("magnitude", "bias"):
        if part in parts and parts[part].info.shape[0] != lora_b.info.shape[0]:
            found = f"{parts[part].info.shape[0]} values, while lora_B has shape {lora_b.info.shape}"
            raise ShapeMismatch(file, parts[part].key, found=found, expected=f"{lora_b.info.shape[0]}, one per output")


def check_targets(pairs: Mapping[str, object], config: AdapterConfig) -> None:
    """The modules with tensors against target_modules, in both directions."""
    for module in pairs:
        if not config.covers(module):
            found = f"{str(config.targets)[:200]}, which does not cover the tensors of {module}"
            raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")
    if isinstance(config.targets, tuple):
        for name in config.targets:
            if not any(ends_with(module, name) for module in pairs) and not config.excludes(name):
                found = f"{name!r}, for which there is no tensor"
                raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")


def build_expert(name: str, pairs: Pairs, tensors: Mapping[str, Tensor], config: AdapterConfig, file: Path) -> Expert:
    """The expert, once every tensor of it is known to be finite."""
    modules = {}
    for module, parts in pairs.items():
        own = {part: tensors[half.key] for part, half in parts.items()}
        check_finite({parts[part].key: tensor for part, tensor in own.items()}, file)
        modules[module] = LoraPair(
            lora_A=own["A"],
            lora_B=own["B"],
            alpha=config.alpha_of(module),
            use_rslora=config.use_rslora,
            magnitude=own.get("magnitude"),
            bias=own.get("bias"),
        )
    return Expert(name, modules, config.names_for_every_layer)


def check_same_sizes(experts: Iterable[Expert], path: Path) -> None:
    """Experts against one another.

    Raises:
        ShapeMismatch: two of them adapt one module with different sizes: they belong to different base models.
        ForeignTensor: one adapts a module of which another has its own version: PEFT cannot hold both.
    """
    experts = tuple(experts)
    _check_own_modules(experts, path)
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for expert in experts:
        for module, pair in expert.modules.items():
            sizes = (pair.lora_A.shape[1], pair.lora_B.shape[0])
            first, wanted = seen.setdefault(module, (expert.name, sizes))
            if sizes != wanted:
                found = f"from {sizes[0]} to {sizes[1]}"
                expected = f"from {wanted[0]} to {wanted[1]}, as in {first}"
                raise ShapeMismatch(path, f"{expert.name}: {module}", found=found, expected=expected)


def _check_own_modules(experts: tuple[Expert, ...], path: Path) -> None:
    owners = {module: expert.name for expert in experts for module in expert.replaced}
    for expert in experts:
        for module in expert.modules:
            owner = next((name for own, name in owners.items() if f".{own}." in f".{module}."), None)
            if owner is not None:
                found = f"an adapter on a module of which {owner} has its own version (modules_to_save)"
                raise ForeignTensor(path, f"{expert.name}: {module}", found=found, expected="one or the other in all experts")


def one_base_model(configs: Iterable[AdapterConfig]) -> str | None:
    """The base model that the adapters record; InvalidField when two of them record different ones."""
    recorded = [(config.base_model, config.file) for config in configs if config.base_model is not None]
    for base, file in recorded[1:]:
        if base != recorded[0][0]:
            expected = f"{recorded[0][0]!r}, as in {recorded[0][1]}"
            raise InvalidField(file, "base_model_name_or_path", found=repr(base), expected=expected)
    return recorded[0][0] if recorded else None
