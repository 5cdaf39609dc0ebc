"""What an adapter holds beside its LoRA pairs: whole modules and biases of its own (modules_to_save, bias), and base weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from dylo_moe.errors import ForeignTensor, InvalidField, ShapeMismatch
from dylo_moe.formats.adapter_config import AdapterConfig
from dylo_moe.formats.checkpoint import Expert
from dylo_moe.formats.patterns import module_of
from dylo_moe.formats.safetensors_file import TensorInfo, check_finite, require_float

# PEFT's save_embedding_layers="auto": the base weight of an adapted readout or embedding is saved with the adapter.
_REPEATED = re.compile(r"(?:.+\.)?(?:lm_head|embed_tokens)\.base_layer\.weight")


@dataclass(frozen=True)
class Beside:
    """replaced: module -> name of its parameter -> key in the file; biases: module -> key in the file; repeated: name of a base
    weight -> key in the file."""

    replaced: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)


def split_beside(header: Mapping[str, TensorInfo], config: AdapterConfig, file: Path) -> tuple[dict[str, TensorInfo], Beside]:
    """The header without what lies beside the pairs, and that.

    Raises:
        InvalidField: a name of modules_to_save without tensors. DtypeUnsupported, ShapeMismatch, ForeignTensor: a tensor.
    """
    pairs: dict[str, TensorInfo] = {}
    beside = Beside()
    for key, info in header.items():
        place, name = _place(key, config, beside)
        if place is None:
            pairs[key] = info
            continue
        require_float(info, key, file)
        if not info.shape or 0 in info.shape:
            raise ShapeMismatch(file, key, found=f"shape {info.shape}", expected="sizes above 0")
        if name in place:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        place[name] = key
    for name in config.saved:
        if not any(module.endswith(name) for module in beside.replaced):
            found = f"{name!r}, for which there is no tensor"
            raise InvalidField(config.file, "modules_to_save", found=found, expected="the modules that have tensors")
    return pairs, beside


def _place(key: str, config: AdapterConfig, beside: Beside) -> tuple[dict[str, str] | None, str]:
    """The dict that a tensor belongs to, and its name in it; None for the tensors of pairs."""
    path = module_of(key)
    saved = saved_module(path, config.saved)
    if saved is not None:
        # Until 0.14, PEFT kept its wrapper's name in some keys.
        return beside.replaced.setdefault(saved, {}), path.removeprefix(f"{saved}.").removeprefix("modules_to_save.")
    module, _, last = path.rpartition(".")
    if _REPEATED.fullmatch(path):
        return beside.repeated, f"{module.removesuffix('.base_layer')}.weight"
    if config.bias != "none" and last == "bias" and ".lora_" not in path:
        return beside.biases, module.removesuffix(".base_layer")
    return None, ""


def saved_module(path: str, names: tuple[str, ...]) -> str | None:
    """The module that PEFT saves whole and that a tensor lies in: the outermost one whose path ends like one of the names."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        module = ".".join(parts[:count])
        if any(module.endswith(name) for name in names):
            return module
    return None


def add_beside(expert: Expert, beside: Beside, tensors: Mapping[str, Tensor], file: Path) -> Expert:
    """The expert with its own modules and biases, once they are known to be finite.

    Raises:
        NonFiniteTensor. ForeignTensor: a base weight of a module that the expert does not adapt.
    """
    for name, key in beside.repeated.items():
        if name.removesuffix(".weight") not in expert.modules:
            raise ForeignTensor(file, key, found="a base weight", expected="one of a module with a pair of its own")
    keys = [*beside.biases.values(), *beside.repeated.values()]
    keys += [key for parameters in beside.replaced.values() for key in parameters.values()]
    check_finite({key: tensors[key] for key in keys}, file)
    replaced = {m: {name: tensors[key] for name, key in parameters.items()} for m, parameters in beside.replaced.items()}
    biases, repeated = ({name: tensors[key] for name, key in found.items()} for found in (beside.biases, beside.repeated))
    return replace(expert, replaced=replaced, biases=biases, repeated=repeated)
