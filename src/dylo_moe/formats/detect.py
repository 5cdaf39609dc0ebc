"""Which format a checkpoint has, from file names, JSON and the names of tensors; no weight is looked at.

Marks, at the top of the directory:
    moe_config.json                              dylo-moe
    peft_adapters/                               dylora-separated
    xlora_config.json                            xlora
    model weights with foundation_model. keys,   dylora-full-state
        or pickled weights without a plain model's config.json
    model weights whose config.json lists        mergoo
        adapter_configs and router_layers
    other model weights with config.json         merged
    adapter_config.json                          by its peft_type; a LORA with the tensors of lora_route is loramoe or hydralora,
                                                 with router.router mola, else peft-lora
    one file checkpoint.pt, or a .pt by name     dylora-bundle
    arrow_router/                                peft-arrow
    subdirectories with adapter_config.json      lora-bag, only where none of the above is present

Two marks are refused as ambiguous, but for one pair that DyLoRA-MoE itself writes: peft_adapters/ beside model weights is
dylora-separated. Subdirectories with adapters beside another mark (a trainer's checkpoint-N) decide nothing.

A safetensors file gives its names in its header, pickled shards in their index. Where a LORA, or a whole model of which
config.json does not say what it is, is one pickle, its names are known only once it is read, which happens in a child process,
weights_only, as every pickle is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylo_moe.errors import MissingFile, UnknownFormat
from dylo_moe.formats import dylora, native, peft_lora
from dylo_moe.formats.dylora_config import is_dylora_config
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.weights import WeightFiles, dylora_pickles, find_weights, has_weights

FULL_STATE = "dylora-full-state"
BUNDLE = "dylora-bundle"
MERGED = "merged"
XLORA = "xlora"
ARROW = "peft-arrow"
MERGOO = "mergoo"
LORAMOE = "loramoe"
HYDRALORA = "hydralora"
MOLA = "mola"
OF_PEFT_TYPE = {
    "ADALORA": "peft-adalora",
    "XLORA": "peft-xlora",
    "POLY": "peft-poly",
    "MIXLORA": "mixlora",
    "LORAMOE": "moe-peft-loramoe",
    "MOLA": "moe-peft-mola",
    "MOLE": "adamole",
    "ADAMOLE": "adamole",
}
FORMATS = (
    native.FORMAT,
    dylora.FORMAT,
    FULL_STATE,
    BUNDLE,
    peft_lora.LORA_FORMAT,
    peft_lora.BAG_FORMAT,
    *dict.fromkeys(OF_PEFT_TYPE.values()),
    XLORA,
    ARROW,
    MERGOO,
    LORAMOE,
    HYDRALORA,
    MOLA,
    MERGED,
)
BUNDLE_FILE = "checkpoint.pt"
XLORA_CONFIG = "xlora_config.json"
ARROW_ROUTER = "arrow_router"
# Formats whose own experts lie in subdirectories with an adapter_config.json.
_WITH_SUBDIRECTORIES = (XLORA, ARROW, "peft-xlora")
# Weights at the root that mean a mixture of the subdirectories, once their configuration is there.
_CONFIG_OF = {
    "adapter_model.safetensors": "adapter_config.json",
    "adapter_model.bin": "adapter_config.json",
    "xlora_classifier.safetensors": XLORA_CONFIG,
    "xlora_classifier.pt": XLORA_CONFIG,
}
_KNOWN = f"one of {', '.join(FORMATS)}"


def detect(files: CheckpointFiles, path: Path) -> str:
    """The format's name; see detect_model_format."""
    if os.path.isfile(path):
        return _of_file(path)
    if not os.path.isdir(path):
        raise MissingFile(path, "", found="no such file or directory", expected="a checkpoint")
    found = _root_marks(files)
    if found == [dylora.FORMAT, "weights"] and _of_weights(files) in (FULL_STATE, MERGED):
        files.warn("peft_adapters/ was read, the model weights beside it were not")
        found = [dylora.FORMAT]
    if len(found) > 1:
        expected = "one format; move the other files away"
        raise UnknownFormat(path, "", found=f"the marks of {' and '.join(found)}", expected=expected)
    if not found:
        return _of_subdirectories(files)
    own = native.SHARED if found[0] == native.FORMAT else None
    beside = [directory.name for directory in peft_lora.adapter_directories(files.root) if directory.name != own]
    if beside and found[0] not in _WITH_SUBDIRECTORIES:
        files.warn(f"the adapters in {', '.join(beside)} were not read; name one of these directories to read it")
    return _of_weights(files) if found == ["weights"] else found[0]


def _root_marks(files: CheckpointFiles) -> list[str]:
    root = files.root
    marks = []
    if files.exists(root / native.CONFIG):
        marks.append(native.FORMAT)
    if files.exists(root / dylora.ADAPTERS):
        marks.append(dylora.FORMAT)
    if has_weights(files, root):
        marks.append("weights")
    if files.exists(root / XLORA_CONFIG):
        marks.append(XLORA)
    if files.exists(root / "adapter_config.json"):
        marks.append(_of_adapter(files))
    if files.exists(root / BUNDLE_FILE):
        marks.append(BUNDLE)
    if files.exists(root / ARROW_ROUTER):
        marks.append(ARROW)
    return marks


def _of_file(path: Path) -> str:
    if path.suffix != ".pt":
        raise UnknownFormat(path, "", found=f"a file with the ending {path.suffix!r}", expected="a directory or a .pt file")
    return FULL_STATE if path.name.startswith("dylo_moe_weights") else BUNDLE


def _of_adapter(files: CheckpointFiles) -> str:
    path = files.root / "adapter_config.json"
    config = files.read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        if not isinstance(kind, str) or kind not in OF_PEFT_TYPE:
            raise UnknownFormat(path, "peft_type", found=repr(kind)[:80], expected=f"LORA, {', '.join(OF_PEFT_TYPE)}")
        return OF_PEFT_TYPE[kind]
    mixture = _mixture_of_lora(files, config)
    if mixture is not None:
        return mixture
    router = _router_file(files)
    if router:
        found = f"a LoRA and {router}"
        raise UnknownFormat(files.root, "", found=found, expected="a LoRA without router, or experts in peft_adapters/")
    return peft_lora.LORA_FORMAT


def _mixture_of_lora(files: CheckpointFiles, config: dict[str, Any]) -> str | None:
    """The format of a mixture that calls itself a LORA; None for a plain one."""
    names = _adapter_tensors(files)
    route = next((name for name in names if ".lora_route." in name), None)
    # MoLA's experts are lora_A_0, lora_A_1 ...; without its routers it is refused as a MoLA rather than misread as one LoRA.
    router = next((name for name in names if ".router.router." in name or ".lora_A_0." in name), None)
    if route and router:
        raise UnknownFormat(files.root, "", found=f"the tensors {route} and {router}", expected="one format")
    if router:
        return MOLA
    if not route and "lora_nums" not in config:
        return None
    return LORAMOE if any(".lora_A0." in name for name in names) else HYDRALORA


def _adapter_tensors(files: CheckpointFiles) -> list[str]:
    safe, pickled = files.root / "adapter_model.safetensors", files.root / "adapter_model.bin"
    if files.exists(safe):
        return list(files.header(safe))
    return files.pickle_keys(pickled) if files.exists(pickled) else []


def _of_weights(files: CheckpointFiles) -> str:
    root = files.root
    config = files.read_json(root / "config.json") if files.exists(root / "config.json") else {}
    weights = find_weights(files, root)
    if isinstance(config.get("adapter_configs"), list) and "router_layers" in config:
        full = next((key for key in weights.header if key.startswith("foundation_model.")), None)
        if full or is_dylora_config(config):
            found = f"the marks of {MERGOO} and {FULL_STATE}"
            raise UnknownFormat(root / "config.json", "adapter_configs", found=found, expected="one format")
        return MERGOO
    if weights.is_pickled:
        return _of_pickled_weights(files, weights, config)
    if any(key.startswith("foundation_model.") for key in weights.header):
        return FULL_STATE
    foreign = [key for key in weights.header if ".lora_A." in key or ".lora_route." in key]
    if foreign:
        found = f"model weights with LoRA tensors, {foreign[0]}"
        raise UnknownFormat(weights.paths[0], "", found=found, expected=_KNOWN)
    if not config:
        raise UnknownFormat(root, "", found="model weights without config.json", expected=_KNOWN)
    return MERGED


def _of_pickled_weights(files: CheckpointFiles, weights: WeightFiles, config: Mapping[str, Any]) -> str:
    """By the index of shards; else by config.json, and where that says neither, by the names in the pickle."""
    if weights.placed:
        return FULL_STATE if any(key.startswith("foundation_model.") for key in weights.placed) else MERGED
    if not config.get("model_type") or weights.paths[0] in dylora_pickles(files.root):
        return FULL_STATE
    if is_dylora_config(config) and "_dylora_num_experts" not in config and "_dylora_original_type" in config:
        keys = files.pickle_keys(weights.paths[0])
        return FULL_STATE if any(key.startswith("foundation_model.") for key in keys) else MERGED
    return FULL_STATE if is_dylora_config(config) else MERGED


def _of_subdirectories(files: CheckpointFiles) -> str:
    root = files.root
    names = [directory.name for directory in peft_lora.adapter_directories(root)]
    router = _router_file(files)
    if names and router:
        found = f"the adapters {', '.join(names[:8])} and {router}"
        raise UnknownFormat(root, "", found=found, expected="experts in peft_adapters/, or a bag of LoRAs without router")
    lost = next(
        (name for name, config in _CONFIG_OF.items() if files.exists(root / name) and not files.exists(root / config)), None
    )
    if names and lost:
        raise MissingFile(
            root / _CONFIG_OF[lost], "", found=f"no such file, and {lost}", expected="the configuration of the mixture"
        )
    if names:
        return peft_lora.BAG_FORMAT
    names = [entry.name for entry in entries(root)]
    found = f"{', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else "an empty directory"
    raise UnknownFormat(root, "", found=found, expected=_KNOWN)


def _router_file(files: CheckpointFiles) -> str | None:
    return next((name for name in dylora.ROUTER_FILES if files.exists(files.root / name)), None)
