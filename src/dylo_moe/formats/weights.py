"""The weight files of a whole model: one safetensors file, shards with an index, or pickles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dylo_moe.errors import ForeignTensor, InvalidField, MissingFile, UnreadableFile
from dylo_moe.formats.adapter import flat_tensors, infos
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.safetensors_file import TensorInfo, check_finite, require_float

# Indices of the largest public models are some 10 MB.
MAX_INDEX_BYTES = 32_000_000
SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"


@dataclass(frozen=True)
class WeightFiles:
    """Files in reading order. `index` and `placed` (tensor -> shard) are those of shards; pickles have no `header`."""

    paths: tuple[Path, ...]
    header: dict[str, TensorInfo]
    index: Path | None = None
    placed: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_pickled(self) -> bool:
        return self.paths[0].suffix != ".safetensors"


def has_weights(files: CheckpointFiles, directory: Path) -> bool:
    """Whether one of the names of a model's weights is in the directory."""
    return any(files.exists(directory / name) for name in _NAMES) or bool(dylora_pickles(directory))


_NAMES = (SAFE, f"{SAFE}.index.json", PICKLED, f"{PICKLED}.index.json")


def dylora_pickles(directory: Path) -> list[Path]:
    """dylo_moe_weights.pt, dylo_moe_weights_poc.pt: the first releases of DyLoRA-MoE."""
    return sorted(directory.glob("dylo_moe_weights*.pt")) if directory.is_dir() else []


def find_weights(files: CheckpointFiles, directory: Path) -> WeightFiles:
    """The weights of a directory; safetensors before pickles, one file before shards, with a warning about the rest.

    Raises:
        MissingFile: no weights, or a shard is missing.
        InvalidField: the index names files outside the directory, or disagrees with the shards' headers.
    """
    present = [directory / name for name in _NAMES if files.exists(directory / name)] + dylora_pickles(directory)
    if not present:
        raise MissingFile(directory, "", found="no weights", expected=f"{SAFE}, {PICKLED} or their .index.json")
    chosen, others = present[0], present[1:]
    if others:
        files.warn(f"{chosen.name} was read, {', '.join(path.name for path in others)} not")
    if chosen.name.endswith(".index.json"):
        return _sharded(files, chosen)
    files.require(chosen)
    header = files.header(chosen) if chosen.suffix == ".safetensors" else {}
    return WeightFiles((chosen,), header)


def _sharded(files: CheckpointFiles, index: Path) -> WeightFiles:
    placed = _weight_map(files, index)
    paths = tuple(index.parent / name for name in sorted(set(placed.values())))
    for path in paths:
        files.require(path, "weight_map")
    if paths[0].suffix != ".safetensors":
        return WeightFiles(paths, {}, index, placed)
    header: dict[str, TensorInfo] = {}
    for path in paths:
        for key, info in files.header(path).items():
            if key in header or placed.get(key) != path.name:
                found = f"the tensor in {path.name}"
                raise InvalidField(index, key, found=found, expected=f"only in {placed.get(key, 'no shard')}")
            header[key] = info
    for key in placed:
        if key not in header:
            raise InvalidField(index, key, found=f"no such tensor in {placed[key]}", expected="the tensor in that shard")
    return WeightFiles(paths, header, index, placed)


def open_weights(
    files: CheckpointFiles, weights: WeightFiles
) -> tuple[Mapping[str, TensorInfo], Callable[[], dict[str, Tensor]]]:
    """Header of all files together, and what reads their tensors; pickles have no header and are read now.

    Raises:
        ForeignTensor: a tensor in two shards, or in another one than the index says.
    """
    if not weights.is_pickled:
        return weights.header, lambda: {k: tensor for path in weights.paths for k, tensor in files.tensors(path).items()}
    files.convert(weights.paths)
    tensors: dict[str, Tensor] = {}
    for path in weights.paths:
        for key, tensor in flat_tensors(files.pickle(path), path).items():
            if key in tensors:
                raise ForeignTensor(path, key, found="a tensor of another shard", expected="each tensor once")
            if weights.index is not None and weights.placed.get(key) != path.name:
                expected = f"only in {weights.placed.get(key, 'no shard')}, as {weights.index.name} says"
                raise ForeignTensor(path, key, found="the tensor", expected=expected)
            tensors[key] = tensor
    for key, name in weights.placed.items():
        if key not in tensors:
            raise InvalidField(weights.index, key, found=f"no such tensor in {name}", expected="the tensor in that shard")
    return infos(tensors), lambda: tensors


def check_base_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises DtypeUnsupported or NonFiniteTensor unless every base weight that a checkpoint brings is a finite float."""
    for key, info in infos(tensors).items():
        require_float(info, key, file)
    check_finite(tensors, file)


def _weight_map(files: CheckpointFiles, index: Path) -> dict[str, str]:
    placed = files.read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InvalidField(index, "weight_map", found=type(placed).__name__, expected="an object of tensors and files")
    suffixes = {Path(str(name)).suffix for name in placed.values()}
    for key, name in placed.items():
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255 or "\0" in name:
            raise InvalidField(index, key, found=repr(name)[:80], expected="the name of a file in the same directory")
    if len(suffixes) != 1 or not suffixes <= {".safetensors", ".bin"}:
        raise UnreadableFile(index, "weight_map", found=f"files {sorted(suffixes)}", expected="shards of one kind")
    return placed
