"""X-LoRA: the layout of PEFT 0.15 to 0.21 (adapter_config.json of type XLORA) and of the standalone package (xlora_config.json).

Experts lie where the configuration says, or beside it where they were moved along with it. Their order is that of their names as
numbers: PEFT writes the names sorted as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.artifact import Artifact
from harness.oracles.xlora import Scaling
from harness.readings.files import array, is_adapter, read_json, read_peft_adapter, read_tensors, weights_file
from harness.routers import Classifier


def read_peft(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    config = read_json(path / "adapter_config.json")
    places = config["adapters"]
    names = tuple(sorted(places, key=int)) if all(name.isdecimal() for name in places) else tuple(places)
    tensors = read_tensors(weights_file(path, "adapter_model"))
    classifier = {name: tensor for name, tensor in tensors.items() if "internal_xlora_classifier" in name}
    return _artifact(path, base_model, config, {name: _found(path, name, places[name]) for name in names}, classifier)


def read_standalone(path: Path, base_model: str | None, assume: Mapping[str, Any]) -> Artifact:
    config = read_json(path / "xlora_config.json")
    config = {**config, "base_model_name_or_path": config.get("base_model_id")}
    tensors = read_tensors(weights_file(path, "xlora_classifier"))
    inner = [name for name in tensors if name.startswith("inner.")]
    last = 1 + max((int(name.split(".")[1]) for name in inner), default=-1)
    renamed = {re.sub(r"^inner\.", "layers.", name): tensors[name] for name in inner}
    renamed |= {name.replace("last.", f"layers.{last}."): tensors[name] for name in tensors if name not in inner}
    places = {name: _found(path, name, name) for name in config["adapters"]}
    return _artifact(path, base_model, {**config, "softmax_topk": "batch"}, places, renamed)


def _artifact(
    path: Path, base_model: str | None, config: Mapping[str, Any], places: Mapping[str, Path], tensors: Mapping[str, Tensor]
) -> Artifact:
    experts = tuple(read_peft_adapter(place) for place in places.values())
    base = config.get("base_model_name_or_path") or _base_of(next(iter(places.values())))
    num_layers = len({module for expert in experts for module in expert})
    return Artifact(
        path=path,
        base=base_model or base,
        names=tuple(places),
        experts=experts,
        router=_classifier(config, tensors, len(experts), num_layers),
        balance={},
        adapter_directories=tuple(places.values()),
        reader="",
    )


def _classifier(config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_experts: int, num_layers: int) -> Classifier:
    def numbered(name: str) -> int:
        return int(re.search(r"layers\.(\d+)\.", name).group(1))

    layers = []
    for weight in sorted((name for name in tensors if name.endswith(".weight")), key=numbered):
        bias = tensors.get(weight.removesuffix("weight") + "bias")
        layers.append((array(tensors[weight]), None if bias is None else array(bias)))
    outputs = num_experts * (num_layers if config.get("layerwise_scalings") else 1)
    if len(layers) != config["xlora_depth"] or len(layers[-1][0]) != outputs:
        found = f"{len(layers)} Linears, the last with {len(layers[-1][0]) if layers else 0} outputs"
        raise ValueError(f"X-LoRA classifier: found {found}, expected {config['xlora_depth']} and {outputs}")
    scaling = Scaling(
        num_experts,
        num_layers,
        layerwise=bool(config.get("layerwise_scalings")),
        softmax=config.get("enable_softmax", True),
        softmax_topk=bool(config.get("enable_softmax_topk")),
        over_batch=config.get("softmax_topk") == "batch",
        temperature=config.get("softmax_temperature", 1.0),
        top_k=config.get("top_k_lora"),
        global_weight=config.get("global_scaling_weight", 1.0),
    )
    plain = config.get("enable_relu_and_dropout", True)
    return Classifier(tuple(layers), scaling, relu=plain, dropout=config.get("xlora_dropout_p", 0.0) if plain else 0.0)


def _found(path: Path, name: str, recorded: str) -> Path:
    places = [Path(recorded), path / recorded, path / Path(recorded).name, path / name]
    places += [directory / name for directory in sorted(path.iterdir()) if directory.is_dir()]
    found = next((place for place in places if is_adapter(place)), None)
    if found is None:
        raise FileNotFoundError(f"{path}: expert {name}: found no adapter, expected {recorded} or a directory {name} here")
    return found


def _base_of(directory: Path) -> str | None:
    return read_json(directory / "adapter_config.json").get("base_model_name_or_path")
