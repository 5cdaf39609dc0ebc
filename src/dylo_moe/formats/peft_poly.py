"""PEFT's Poly (arXiv 2202.13914), with n_splits > 1 multi-head routing (arXiv 2211.03831): skills mixed per task, not per token.

In each adapted Linear, with the task's logits z (n_splits, n_skills): w = sigmoid(z) / (sum over the skills + 1e-12);
A = sum over the skills of w A_skill, split by split over the inputs; B likewise over the outputs; y = W x + b + (B A x) / r.
The mean is taken before the product, so a task is one LoRA of its own: here, each task is an expert.
Keys: <module>.poly_lora_A (n_splits, n_skills, in / n_splits, r), poly_lora_B (n_splits, n_skills, r, out / n_splits),
poly_router.module_logits (n_tasks, n_splits * n_skills).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylo_moe.errors import ExpertEmpty, ForeignTensor, IncompletePair, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter_config import AdapterConfig, optional_text, parse_names, parse_rank
from dylo_moe.formats.checkpoint import Checkpoint, Expert, LoraPair
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.gated import MAX_EXPERTS, adapter_header
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.patterns import ends_with, module_of
from dylo_moe.formats.safetensors_file import TensorInfo, check_finite, require_float, require_integer
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "peft-poly"
EPSILON = 1e-12
MAX_SKILLS = 4_096
_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{_A}|{_B}|{re.escape(_LOGITS)})")

# module -> {part: key}
Units = dict[str, dict[str, str]]


@dataclass(frozen=True)
class _Config:
    """The validated adapter_config.json."""

    tasks: int
    skills: int
    splits: int
    adapter: AdapterConfig


def read_poly(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a Poly adapter. There is no router: whoever calls the model names the task of each row, as expert_id.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = _config(files)
    path, header, tensors_of = adapter_header(files)
    units = _units(header, path)
    for module, parts in units.items():
        _check_shapes(module, {part: header[key].shape for part, key in parts.items()}, config, path)
    _check_targets(units, config.adapter)
    tensors = tensors_of()
    check_finite(tensors, path)
    pairs = {module: _task_pairs({part: tensors[key] for part, key in parts.items()}, config) for module, parts in units.items()}
    targets = config.adapter.names_for_every_layer
    files.warn("tasks are experts: give the task id of each row as expert_id")
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=config.adapter.base_model,
        experts=tuple(
            Expert(f"task_{task}", {module: each[task] for module, each in pairs.items()}, targets)
            for task in range(config.tasks)
        ),
        router=None,
        tokenizer=tokenizer_directory(files.root),
    )


def _task_pairs(tensors: Mapping[str, Tensor], config: _Config) -> list[LoraPair]:
    """One Linear's adapter of each task. The means are taken in float64, where PEFT has float32: no less exact."""
    logits = tensors[_LOGITS].double().view(config.tasks, config.splits, config.skills)
    weights = torch.sigmoid(logits)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    dtype = torch.promote_types(tensors[_A].dtype, torch.float32)
    pairs = []
    for task in weights:
        lora_A = torch.einsum("qs,qsir->rqi", task, tensors[_A].double()).flatten(1)
        lora_B = torch.einsum("qs,qsro->qor", task, tensors[_B].double()).flatten(0, 1)
        pairs.append(LoraPair(lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous(), alpha=1.0))
    return pairs


def _config(files: CheckpointFiles) -> _Config:
    path = files.root / "adapter_config.json"
    data = files.read_json(path)
    for field, allowed in (("poly_type", ("poly",)), ("modules_to_save", (None, [])), ("task_type", (None, "CAUSAL_LM"))):
        if data.get(field) not in allowed:
            raise InvalidField(path, field, found=repr(data.get(field))[:80], expected=f"{allowed[-1]!r}: nothing else is read")
    sizes = {"n_tasks": MAX_EXPERTS, "n_skills": MAX_SKILLS, "n_splits": MAX_SKILLS}
    tasks, skills, splits = (require_integer(data.get(name), path, name, low=1, high=high) for name, high in sizes.items())
    return _Config(tasks, skills, splits, _adapter(data, files))


def _adapter(data: dict[str, Any], files: CheckpointFiles) -> AdapterConfig:
    path = files.root / "adapter_config.json"
    targets = parse_names(data.get("target_modules"), path, "target_modules")
    if targets is None:
        raise InvalidField(path, "target_modules", found="nothing", expected="a list of module names or a pattern")
    return AdapterConfig(
        file=path,
        rank=parse_rank(data.get("r"), path, "r"),
        alpha=1.0,
        targets=targets,
        excluded=parse_names(data.get("exclude_modules"), path, "exclude_modules"),
        base_model=optional_text(data.get("base_model_name_or_path"), path, "base_model_name_or_path"),
    )


def _units(header: Mapping[str, TensorInfo], path: Path) -> Units:
    if not header:
        raise ExpertEmpty(path, "", found="0 tensors", expected=f"{_A}, {_B} and {_LOGITS}")
    units: Units = {}
    for key, info in header.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ForeignTensor(path, key, found="a tensor that is no part of Poly", expected=f"only {_A}, {_B} and {_LOGITS}")
        require_float(info, key, path)
        parts = units.setdefault(module_of(match["module"]), {})
        if match["part"] in parts:
            raise ForeignTensor(path, key, found="the same tensor under two keys", expected="one")
        parts[match["part"]] = key
    for parts in units.values():
        for part in (_A, _B, _LOGITS):
            if part not in parts:
                raise IncompletePair(path, next(iter(parts.values())), found=f"no {part}", expected="all three of a module")
    return units


def _check_shapes(module: str, shapes: Mapping[str, tuple[int, ...]], config: _Config, path: Path) -> None:
    rank = config.adapter.rank
    for part, place in ((_A, 3), (_B, 2)):
        shape = shapes[part]
        if len(shape) != 4 or 0 in shape or (shape[0], shape[1], shape[place]) != (config.splits, config.skills, rank):
            expected = f"n_splits {config.splits}, n_skills {config.skills} and r {rank}, as in adapter_config.json"
            raise ShapeMismatch(path, f"{module}.{part}", found=f"shape {shape}", expected=expected)
    wanted = (config.tasks, config.splits * config.skills)
    if shapes[_LOGITS] != wanted:
        expected = f"{wanted}, (n_tasks, n_splits * n_skills) of adapter_config.json"
        raise ShapeMismatch(path, f"{module}.{_LOGITS}", found=f"shape {shapes[_LOGITS]}", expected=expected)


def _check_targets(units: Units, config: AdapterConfig) -> None:
    for module in units:
        if not config.covers(module):
            found = f"{str(config.targets)[:200]}, which does not cover the tensors of {module}"
            raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")
    for name in config.targets if isinstance(config.targets, tuple) else ():
        if not any(ends_with(module, name) for module in units):
            found = f"{name!r}, for which there is no tensor"
            raise InvalidField(config.file, "target_modules", found=found, expected="the modules that have tensors")
