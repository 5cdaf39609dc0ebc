"""AdaLoRA of PEFT (arXiv 2303.10512): delta(x) = B diag(E) A x * scaling / ranknum, read as the plain LoRA that it is.

As peft.tuners.adalora has it when it loads a directory: scaling is lora_alpha, or the module's rank where lora_alpha is not above
0; ranknum is init_r, also where rank_pattern has cut the rank, plus 1e-5. Neither use_rslora nor alpha_pattern counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import ExpertEmpty, ForeignTensor, IncompletePair, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter import Half, check_expert_name, check_targets, open_weights
from dylo_moe.formats.adapter_config import AdapterConfig, common_fields, parse_rank, parse_scale
from dylo_moe.formats.beside import add_beside, split_beside
from dylo_moe.formats.checkpoint import Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.patterns import module_of
from dylo_moe.formats.safetensors_file import TensorInfo, check_finite, require_float

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ABE])")
_RANK_KEY = re.compile(r"(?P<module>.+)\.lora_E(?:\.[^.]+)?")
# Added by PEFT to the number of ranks before dividing by it.
_EPSILON = 1e-5


@dataclass(frozen=True)
class AdaConfig:
    """ranks: module -> rank after pruning, where a file records it; the others have init_r."""

    adapter: AdapterConfig
    init_r: int
    ranks: Mapping[str, int]


def read_adalora(files: CheckpointFiles, directory: Path, name: str) -> tuple[Expert, AdapterConfig]:
    """Read adapter_config.json and the weights of one AdaLoRA; modules that were pruned to rank 0 are left out.

    Raises:
        CheckpointError: as read_adapter.
    """
    check_expert_name(name, directory)
    config = _read_config(files, directory / "adapter_config.json")
    header, tensors, path = open_weights(files, directory)
    header, beside = split_beside(header, config.adapter, path)
    parts = _sort(header, name, path)
    _check(parts, config, path)
    read = tensors()
    modules = {module: _fold(own, read, config, path) for module, own in parts.items() if own["E"].info.shape[0] > 0}
    if not modules:
        raise ExpertEmpty(path, name, found="rank 0 in every module", expected="at least one rank that was not pruned")
    files.warn(f"{files.relative(directory)}: AdaLoRA, read as a plain LoRA with the singular values E multiplied into A")
    targets = config.adapter.names_for_every_layer if len(modules) == len(parts) else ()
    return add_beside(Expert(name, modules, targets), beside, read, path), config.adapter


def _read_config(files: CheckpointFiles, path: Path) -> AdaConfig:
    data = files.read_json(path)
    common = common_fields(data, files, path)
    for field, found in (("use_dora", common.use_dora), ("lora_bias", common.lora_bias)):
        if found:
            raise InvalidField(path, field, found="true", expected="false: AdaLoRA has no such variant")
    init_r = parse_rank(data.get("init_r"), path, "init_r")
    ranks = _ranks(data.get("rank_pattern"), init_r, path)
    alpha = parse_scale(data.get("lora_alpha"), path, "lora_alpha")
    return AdaConfig(replace(common, use_rslora=False, rank=init_r, alpha=alpha), init_r, ranks)


def _ranks(pattern: Any, init_r: int, path: Path) -> dict[str, int]:
    """rank_pattern: "<module>.lora_E" -> for each of init_r ranks whether it is still there."""
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise InvalidField(path, "rank_pattern", found=repr(pattern)[:80], expected="an object of lists of booleans")
    ranks = {}
    for key, kept in pattern.items():
        match = _RANK_KEY.fullmatch(key)
        fits = isinstance(kept, list) and len(kept) == init_r and all(type(item) is bool for item in kept)
        if match is None or not fits:
            expected = f'"<module>.lora_E": a list of {init_r} booleans, as init_r says'
            raise InvalidField(path, f"rank_pattern[{key[:80]}]", found=repr(kept)[:80], expected=expected)
        ranks[match["module"]] = sum(kept)
    return ranks


def _sort(header: Mapping[str, TensorInfo], name: str, file: Path) -> dict[str, dict[str, Half]]:
    """module -> "A", "B" and "E"."""
    if not header:
        raise ExpertEmpty(file, name, found="0 tensors", expected="lora_A, lora_B and lora_E")
    parts: dict[str, dict[str, Half]] = {}
    for key, info in header.items():
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "only lora_A, lora_B and lora_E"
            raise ForeignTensor(file, key, found="a tensor that does not belong to an AdaLoRA", expected=expected)
        own = parts.setdefault(module_of(match["module"]), {})
        if match["part"] in own:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        own[match["part"]] = Half(key, info)
    return parts


def _check(parts: Mapping[str, Mapping[str, Half]], config: AdaConfig, file: Path) -> None:
    for module, own in parts.items():
        for part in "ABE":
            if part not in own:
                key = next(iter(own.values())).key
                raise IncompletePair(file, key, found=f"no lora_{part} beside it", expected="lora_A, lora_B and lora_E")
            require_float(own[part].info, own[part].key, file)
        rank = config.ranks.get(module, config.init_r)
        wanted = {"A": (rank, None), "B": (None, rank), "E": (rank, 1)}
        for part, sizes in wanted.items():
            shape = own[part].info.shape
            fits = len(shape) == 2 and all(size in (None, there) for size, there in zip(sizes, shape, strict=True))
            if not fits or (rank and 0 in shape):
                expected = f"rank {rank} of {config.adapter.file.name}"
                raise ShapeMismatch(file, own[part].key, found=f"shape {shape}", expected=expected)
    check_targets(parts, config.adapter)


def _fold(own: Mapping[str, Half], tensors: Mapping[str, Tensor], config: AdaConfig, file: Path) -> LoraPair:
    check_finite({half.key: tensors[half.key] for half in own.values()}, file)
    lora_a, lora_b, lora_e = (tensors[own[part].key] for part in "ABE")
    rank, alpha = len(lora_a), config.adapter.alpha
    scaling = alpha if alpha > 0 else float(rank)
    return LoraPair(lora_a * lora_e, lora_b, alpha=rank * scaling / (config.init_r + _EPSILON))
