"""MoLE and AdaMoLE as zefang-liu/AdaMoLE (arXiv 2405.00361) writes them.

y = W x + sum_e w_e alpha/r * B_e A_e x in each adapted Linear, p = softmax(gate x), and
MOLE with top_k: the k largest p, renormalised; MOLE with threshold: p where it is at least threshold, renormalised;
ADAMOLE: max(p - max_threshold * sigmoid(threshold gate x), 0), renormalised; where nothing is left, y = W x.
Keys: <module>.lora_A.{e}.weight, lora_B.{e}.weight, lora_gating.weight, lora_threshold.{weight,bias}; and every pair a second
time as <module>.moe_layer.experts.{e}.lora_A.weight, which the authors' own loader ignores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dylo_moe.errors import ForeignTensor, GateMissing, InvalidField
from dylo_moe.formats.adapter import module_of
from dylo_moe.formats.checkpoint import Checkpoint, GatesState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.gated import (
    GATE,
    MAX_EXPERTS,
    THRESHOLD,
    THRESHOLD_BIAS,
    GatedState,
    Part,
    adapter_header,
    build_experts,
    build_gates,
    check_top_k,
    check_units,
    refuse_options,
    sort_units,
)
from dylo_moe.formats.gated_config import GatedConfig, read_gated_config
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import require_integer
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "adamole"
_NUMBER = r"(?P<expert>0|[1-9][0-9]{0,5})"
_KEY = re.compile(
    rf"(?P<module>.+?)\.(?:lora_(?P<half>[AB])\.{_NUMBER}\.weight|(?P<gate>lora_gating\.weight|lora_threshold\.(?:weight|bias)))"
)
_COPY = re.compile(rf"(?P<module>.+?)\.moe_layer\.experts\.{_NUMBER}\.lora_(?P<half>[AB])\.weight")
_GATES = {"lora_gating.weight": GATE, "lora_threshold.weight": THRESHOLD, "lora_threshold.bias": THRESHOLD_BIAS}


def read_adamole(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a MOLE or ADAMOLE adapter.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = read_gated_config(files, options, rank="lora_rank")
    adaptive = config.data["peft_type"] == "ADAMOLE"
    count = require_integer(config.data.get("num_experts"), config.file, "num_experts", low=1, high=MAX_EXPERTS)
    rule, top_k, threshold = _rule(config, options, count, adaptive=adaptive)
    path, header, tensors_of = adapter_header(files)
    copies = {key: f"{match['module']}.lora_{match['half']}.{match['expert']}.weight" for key, match in _copies(header)}
    units = sort_units({key: info for key, info in header.items() if key not in copies}, _meaning, path)
    state = check_units(
        units, lambda _: config.adapter, path, gate="lora_gating.weight", recorded=(count, config.file, "num_experts")
    )
    _check_thresholds(state, adaptive=adaptive)
    tensors = tensors_of()
    _check_copies(copies, tensors, path)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=config.base_model,
        experts=build_experts(state, tensors),
        router=GatesState(build_gates(state, tensors, lambda _: top_k), rule, count, threshold=threshold),
        tokenizer=tokenizer_directory(files.root),
    )


def _rule(config: GatedConfig, options: ReadOptions, count: int, *, adaptive: bool) -> tuple[str, int | None, float | None]:
    """(rule of the gates, top_k, threshold); one of the last two is None."""
    if adaptive:
        refuse_options(options, config.file, ("temperature", "router_features", "top_k"))
        threshold = _threshold(config, "max_threshold")
        return "adaptive_threshold", None, 1 / count if threshold is None else threshold
    recorded, threshold = config.data.get("top_k"), _threshold(config, "threshold")
    if (recorded is None) == (threshold is None):
        found = "neither it nor threshold" if recorded is None else "it and threshold"
        raise InvalidField(config.file, "top_k", found=found, expected="one of the two")
    if threshold is not None:
        refuse_options(options, config.file, ("temperature", "router_features", "top_k"))
        return "threshold", None, threshold
    refuse_options(options, config.file)
    top_k = check_top_k(recorded, count, config.file)
    return "softmax_topk", top_k if options.top_k is None else check_top_k(options.top_k, count, config.file), None


def _threshold(config: GatedConfig, name: str) -> float | None:
    value = config.data.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise InvalidField(config.file, name, found=repr(value)[:80], expected="a number from 0 to 1, or null")
    return float(value)


def _meaning(key: str) -> Part | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module = module_of(match["module"])
    return Part(module, _GATES[match["gate"]]) if match["gate"] else Part(module, match["half"], int(match["expert"]))


def _check_thresholds(state: GatedState, *, adaptive: bool) -> None:
    for module, unit in state.units.items():
        for name, kind in _GATES.items():
            if adaptive and kind not in unit.gate:
                raise GateMissing(state.file, f"{module}.{name}", found="no such tensor", expected="AdaMoLE's threshold gate")
            if not adaptive and kind != GATE and kind in unit.gate:
                expected = "no threshold gate, since peft_type is MOLE"
                raise ForeignTensor(state.file, unit.gate[kind].key, found="a threshold gate", expected=expected)


def _copies(header: Mapping[str, object]) -> list[tuple[str, re.Match[str]]]:
    return [(key, match) for key in header if (match := _COPY.fullmatch(key))]


def _check_copies(copies: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> None:
    for copy, original in copies.items():
        if original not in tensors:
            raise ForeignTensor(path, copy, found="a copy without its original", expected=f"{original} beside it")
        if not _same_bits(tensors[copy], tensors[original]):
            raise ForeignTensor(path, copy, found="other values than its original has", expected=f"those of {original}")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)))
