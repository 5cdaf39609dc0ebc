"""MoLA as its authors write it (arXiv 2402.08562, GCYZSL/MoLA): more experts in higher layers.

y = W x + sum_e w_e alpha/r_l * B_e A_e x in each adapted Linear, w = softmax(router x), the k largest renormalised.
Keys: <module>.router.router.weight; <module>.lora_A_{e}.weight, since saving removes ".default" from "lora_A.default_{e}";
lora_A.<adapter>_{e} in a state dict that was saved without it. r is a list with one rank per layer. The number of experts of a
layer follows from the tensors; k is in no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from dylo_moe.errors import ForeignTensor, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter import module_of
from dylo_moe.formats.checkpoint import Checkpoint, GatesState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.gated import (
    GATE,
    Part,
    Unit,
    adapter_header,
    build_experts,
    build_gates,
    check_top_k,
    check_units,
    layer_number,
    refuse_options,
    sort_units,
)
from dylo_moe.formats.gated_config import GatedConfig, read_gated_config
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.tokenizer_files import tokenizer_directory

FORMAT = "mola"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<gate>router\.router)|lora_(?P<half>[AB])(?P<adapter>\.[^.]+)?_(?P<expert>0|[1-9][0-9]{0,5}))\.weight"
)


def read_mola(files: CheckpointFiles, options: ReadOptions) -> Checkpoint:
    """Read a MoLA adapter; options.top_k, an int or one per layer of the base model, must be given.

    Raises:
        CheckpointError: any of its subclasses, naming file and field.
    """
    config = read_gated_config(files, options, per_layer=True)
    refuse_options(options, config.file)
    if options.top_k is None:
        expected = "top_k=, an integer or one per layer: MoLA's files do not record it"
        raise InvalidField(config.file, "top_k", found="nothing", expected=expected)
    path, header, tensors_of = adapter_header(files)
    adapters = {match["adapter"] for match in map(_KEY.fullmatch, header) if match and match["half"]}
    if len(adapters) > 1:
        found = f"adapters {', '.join(sorted(str(name) for name in adapters))}"
        raise ForeignTensor(path, "", found=found, expected="the experts of one adapter")
    state = check_units(
        sort_units(header, _meaning, path), lambda _: config.adapter, path, gate="router.router.weight", recorded=None
    )
    _check_layers(state.units, config)
    chosen = _top_k_of(state.units, options, config)
    tensors = tensors_of()
    files.assumptions["top_k"] = options.top_k if isinstance(options.top_k, int) else list(options.top_k)
    return Checkpoint(
        path=files.root,
        format=FORMAT,
        base_model=config.base_model,
        experts=build_experts(state, tensors),
        router=GatesState(build_gates(state, tensors, lambda module: chosen[module]), "softmax_topk", state.num_experts),
        tokenizer=tokenizer_directory(files.root),
    )


def _meaning(key: str) -> Part | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module = module_of(match["module"])
    return Part(module, GATE) if match["gate"] else Part(module, match["half"], int(match["expert"]))


def _check_layers(units: Mapping[str, Unit], config: GatedConfig) -> None:
    """One number of experts within a layer, and the rank that the configuration gives the layer."""
    counts: dict[int | None, tuple[int, str]] = {}
    for module, unit in units.items():
        layer = layer_number(module)
        wanted, first = counts.setdefault(layer, (len(unit.experts), module))
        if len(unit.experts) != wanted:
            found = f"{len(unit.experts)} experts"
            raise ShapeMismatch(config.file, module, found=found, expected=f"{wanted}, as {first} of the same layer")
        if isinstance(config.rank, tuple):
            half = unit.experts[0]["A"]
            if layer is None or layer >= len(config.rank):
                found = f"{len(config.rank)} ranks, while there are tensors of layer {layer}"
                raise InvalidField(config.file, "r", found=found, expected="a rank for each layer")
            for halves in unit.experts.values():
                if halves["A"].info.shape[0] != config.rank[layer]:
                    found, expected = f"rank {halves['A'].info.shape[0]}", f"rank {config.rank[layer]} of {config.file.name}"
                    raise ShapeMismatch(config.file, half.key, found=found, expected=expected)


def _top_k_of(units: Mapping[str, Unit], options: ReadOptions, config: GatedConfig) -> dict[str, int]:
    given = options.top_k
    if not isinstance(given, tuple | list):
        return {module: check_top_k(given, len(unit.experts), config.file) for module, unit in units.items()}
    layers = 1 + max(layer_number(module) or 0 for module in units)
    if len(given) < layers or (config.layers is None and len(given) != layers):
        found = f"{len(given)} values"
        raise InvalidField(config.file, "top_k", found=found, expected=f"one for each of {layers} layers")
    return {
        module: check_top_k(given[layer_number(module) or 0], len(unit.experts), config.file) for module, unit in units.items()
    }
