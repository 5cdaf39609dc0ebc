"""X-LoRA's classifier, as PEFT and the standalone package store it: configuration and tensors -> XLoraState."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import ExpertCountMismatch, ForeignTensor, GateMissing, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter import check_finite, flat_tensors, infos
from dylo_moe.formats.checkpoint import SOFTMAX_TOPK, XLoraState
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions
from dylo_moe.formats.safetensors_file import TensorInfo, require_float, require_integer

MAX_DEPTH = 64
MAX_WIDTH = 1_000_000
# What both packages take where the file says nothing.
_DEFAULT_DROPOUT = 0.2
_DEFAULT_SIZE = 2048
_OVER_BATCH = (
    "enable_softmax_topk is one softmax over all tokens of a batch: what a token gets depends on later tokens, other rows and"
    " padding, and there is no KV cache; the option softmax_topk=token takes one for each token instead"
)


@dataclass(frozen=True)
class ClassifierConfig:
    """The validated fields that decide what the classifier computes; their names are those of XLoraState or of the files."""

    file: Path
    hidden_size: int
    depth: int
    size: int
    dropout: float
    layerwise: bool
    enable_softmax: bool
    enable_softmax_topk: bool
    softmax_topk: str
    temperature: float
    top_k: int | None
    global_scaling_weight: float
    use_trainable_adapters: bool
    use_relu: bool
    use_bias: bool


def classifier_config(
    data: Mapping[str, Any], path: Path, num_experts: int, options: ReadOptions, *, softmax_topk: str
) -> ClassifierConfig:
    """The fields of XLoraConfig in `data`, PEFT's or the standalone one; absent ones have the packages' defaults.

    Args:
        softmax_topk: what the package's enable_softmax_topk is taken over, where the user says nothing else.

    Raises:
        InvalidField: a wrong type or an impossible value, or a scaling_pass_value other than 0.
    """
    _check_feature_pass(data, path, options)
    check_softmax_topk(options, path)
    top_k = data.get("top_k_lora") if options.top_k is None else options.top_k
    temperature = data.get("softmax_temperature", 1.0) if options.temperature is None else options.temperature
    return ClassifierConfig(
        file=path,
        hidden_size=require_integer(data.get("hidden_size"), path, "hidden_size", low=1, high=MAX_WIDTH),
        depth=require_integer(data.get("xlora_depth", 1), path, "xlora_depth", low=1, high=MAX_DEPTH),
        size=require_integer(data.get("xlora_size", _DEFAULT_SIZE), path, "xlora_size", low=1, high=MAX_WIDTH),
        dropout=_number(data.get("xlora_dropout_p", _DEFAULT_DROPOUT), path, "xlora_dropout_p", low=0.0, high=0.999),
        layerwise=_flag(data, path, "layerwise_scalings", default=False),
        enable_softmax=_flag(data, path, "enable_softmax", default=True),
        enable_softmax_topk=_flag(data, path, "enable_softmax_topk", default=False),
        softmax_topk=options.softmax_topk or softmax_topk,
        temperature=_number(temperature, path, "softmax_temperature", low=1e-6, high=1e6),
        top_k=None if top_k is None else require_integer(top_k, path, "top_k_lora", low=1, high=num_experts),
        global_scaling_weight=_number(data.get("global_scaling_weight", 1.0), path, "global_scaling_weight", -1e6, 1e6),
        use_trainable_adapters=_flag(data, path, "use_trainable_adapters", default=False),
        use_relu=_flag(data, path, "enable_relu_and_dropout", default=True),
        use_bias=_flag(data, path, "use_bias", default=True),
    )


def check_header(header: Mapping[str, TensorInfo], names: list[str], config: ClassifierConfig, count: int, file: Path) -> None:
    """The tensors of the Linears `names`, in order, against the configuration and the number of experts; nothing is read.

    Raises:
        GateMissing: a tensor is absent. ForeignTensor: one too many. ShapeMismatch, DtypeUnsupported.
        ExpertCountMismatch: the last Linear has other outputs than the experts need.
    """
    wanted = [f"{name}.{part}" for name in names for part in (("weight", "bias") if config.use_bias else ("weight",))]
    for key in wanted:
        if key not in header:
            found = f"tensors {', '.join(sorted(header))[:200] or 'none'}"
            raise GateMissing(file, key, found=found, expected=f"{config.depth} Linears, as xlora_depth says")
    for key in header:
        if key not in wanted:
            expected = f"only the {config.depth} Linears of the classifier"
            raise ForeignTensor(file, key, found="a tensor that does not belong to it", expected=expected)
        require_float(header[key], key, file)
    width = config.hidden_size
    for name in names:
        shape = header[f"{name}.weight"].shape
        rows = config.size if name != names[-1] else shape[0] if shape else 0
        _check_linear(header, name, (rows, width), config.use_bias, file)
        width = rows
    _check_outputs(width, config, count, file, f"{names[-1]}.weight")


def read_classifier(
    files: CheckpointFiles, file: Path, names: list[str], config: ClassifierConfig, *, num_experts: int, num_layers: int
) -> XLoraState:
    """The classifier of `num_experts` experts on `num_layers` modules, every tensor finite; see check_header."""
    if file.suffix == ".safetensors":
        check_header(files.header(file), names, config, num_experts, file)
        tensors = files.tensors(file)
    else:
        tensors = flat_tensors(files.pickle(file), file)
        check_header(infos(tensors), names, config, num_experts, file)
    check_finite(tensors, file)
    layers = tuple((tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names)
    _check_layers(layers, config, num_experts * num_layers, file, f"{names[-1]}.weight")
    state = XLoraState(
        layers=layers,
        num_experts=num_experts,
        num_layers=num_layers,
        layerwise=config.layerwise,
        enable_softmax=config.enable_softmax,
        enable_softmax_topk=config.enable_softmax_topk,
        softmax_topk=config.softmax_topk,
        softmax_temperature=config.temperature,
        top_k=config.top_k,
        global_scaling_weight=config.global_scaling_weight,
        dropout=config.dropout if config.use_relu else 0.0,
        use_relu=config.use_relu,
    )
    warn_of_batch(state, files)
    return state


def warn_of_batch(state: XLoraState, files: CheckpointFiles) -> None:
    if state.over_batch:
        files.warn(_OVER_BATCH)


def check_softmax_topk(options: ReadOptions, path: Path) -> None:
    """Raises InvalidField unless the user says one of SOFTMAX_TOPK, or nothing."""
    if options.softmax_topk not in (None, *SOFTMAX_TOPK):
        found = repr(options.softmax_topk)[:80]
        raise InvalidField(path, "softmax_topk", found=found, expected=f"one of {', '.join(SOFTMAX_TOPK)}")


def _check_feature_pass(data: Mapping[str, Any], path: Path, options: ReadOptions) -> None:
    value = data.get("scaling_pass_value", 0.0)
    if type(value) not in (int, float) or value != 0:
        expected = "0: the classifier looks at the base model alone; with another value it would look at a sum of all experts"
        raise InvalidField(path, "scaling_pass_value", found=repr(value)[:80], expected=expected)
    if options.router_features not in (None, "base"):
        found = repr(options.router_features)[:80]
        raise InvalidField(path, "router_features", found=found, expected="'base', all that X-LoRA's classifier looks at")


def _check_linear(header: Mapping[str, TensorInfo], name: str, shape: tuple[int, int], bias: bool, file: Path) -> None:
    found = header[f"{name}.weight"].shape
    if found != shape or 0 in shape:
        raise ShapeMismatch(file, f"{name}.weight", found=f"shape {found}", expected=f"{shape}, from the configuration")
    if bias and header[f"{name}.bias"].shape != shape[:1]:
        found = f"shape {header[f'{name}.bias'].shape}"
        raise ShapeMismatch(file, f"{name}.bias", found=found, expected=f"{shape[:1]}")


def _check_outputs(rows: int, config: ClassifierConfig, count: int, file: Path, key: str) -> None:
    if rows == count or (config.layerwise and rows % count == 0):
        return
    expected = f"{'a multiple of ' if config.layerwise else ''}{count}, the number of experts"
    raise ExpertCountMismatch(file, key, found=f"{rows} rows", expected=expected)


def _check_layers(
    layers: tuple[tuple[Tensor, Tensor | None], ...], config: ClassifierConfig, outputs: int, file: Path, key: str
) -> None:
    rows = layers[-1][0].shape[0]
    if config.layerwise and rows != outputs:
        raise ShapeMismatch(file, key, found=f"{rows} rows", expected=f"{outputs}: experts times adapted modules")


def _flag(data: Mapping[str, Any], file: Path, name: str, *, default: bool) -> bool:
    value = data.get(name, default)
    if type(value) is not bool:
        raise InvalidField(file, name, found=repr(value)[:80], expected="true or false")
    return value


def _number(value: object, file: Path, name: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise InvalidField(file, name, found=repr(value)[:80], expected=f"a number from {low} to {high}")
    return float(value)
