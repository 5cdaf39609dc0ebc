"""LoRAMoE (arXiv 2312.09979, Ablustrund/LoRAMoE) and HydraLoRA (arXiv 2404.19245, Clin0212/HydraLoRA).

y = W x + sum_e softmax(route x)_e * alpha/r * B_e A_e x, dense, in each adapted Linear; HydraLoRA's experts share one A.
Keys: <module>.lora_route.weight, .lora_B{e}.weight, and .lora_A{e}.weight (LoRAMoE) or .lora_A.weight (HydraLoRA).
"""

from __future__ import annotations

import re

from dylo_moe.errors import ForeignTensor, InvalidField
from dylo_moe.formats.adapter import module_of
from dylo_moe.formats.checkpoint import Checkpoint, GatesState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.gated import (
    GATE,
    MAX_EXPERTS,
    Part,
    adapter_header,
    build_experts,
    build_gates,
    check_units,
    refuse_options,
    sort_units,
)
from dylo_moe.formats.gated_config import read_gated_config
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import require_integer
from dylo_moe.formats.tokenizer_files import tokenizer_directory

LORAMOE, HYDRALORA = "loramoe", "hydralora"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?:(?P<half>[AB])(?P<expert>0|[1-9][0-9]{0,5})?|(?P<gate>route))\.weight")


def read_loramoe(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Fudan's LoRAMoE: every expert has its own A and B.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    return _read(files, options, LORAMOE)


def read_hydralora(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """HydraLoRA: one A per Linear, which the experts' pairs share as one tensor.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    return _read(files, options, HYDRALORA)


def _read(files: CheckpointFiles, options: ReadOptions, name: str) -> Checkpoint:
    config = read_gated_config(files, options)
    refuse_options(options, config.file, ("temperature", "router_features", "top_k"))
    if config.data.get("fan_in_fan_out"):
        raise InvalidField(config.file, "fan_in_fan_out", found="true", expected="false: these adapt plain Linears only")
    count = require_integer(config.data.get("lora_nums"), config.file, "lora_nums", low=1, high=MAX_EXPERTS)
    path, header, tensors_of = adapter_header(files)
    units = sort_units(header, _meaning, path)
    for unit in units.values():
        halves = [halves["A"] for halves in unit.experts.values() if "A" in halves and "A" in unit.shared]
        own = [half.key for half in halves if half is not unit.shared["A"]]
        if own:
            raise ForeignTensor(path, own[0], found="an expert's own A beside a shared one", expected="either")
    state = check_units(
        units, lambda _: config.adapter, path, gate="lora_route.weight", recorded=(count, config.file, "lora_nums")
    )
    tensors = tensors_of()
    return Checkpoint(
        path=files.root,
        format=name,
        base_model=config.base_model,
        experts=build_experts(state, tensors),
        router=GatesState(build_gates(state, tensors, lambda _: None), "softmax", count),
        tokenizer=tokenizer_directory(files.root),
    )


def _meaning(key: str) -> Part | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module, expert = module_of(match["module"]), match["expert"]
    if match["gate"]:
        return Part(module, GATE)
    if match["half"] == "B" and expert is None:
        return None
    return Part(module, match["half"], None if expert is None else int(expert))
