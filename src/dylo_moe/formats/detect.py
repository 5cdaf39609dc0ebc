"""Which format a checkpoint has, from file names, JSON and safetensors headers; weights and pickles stay closed.

Marks, at the top of the directory:
    moe_config.json                              dylo-moe
    peft_adapters/                               dylora-separated
    model weights with foundation_model. keys,   dylora-full-state
        or pickled weights without a plain model's config.json
    other model weights with config.json         merged
    adapter_config.json of a LoRA                peft-lora
    one file checkpoint.pt, or a .pt by name     dylora-bundle
    subdirectories with adapter_config.json      lora-bag, only where none of the above is present

Two marks are refused as ambiguous, but for one pair that DyLoRA-MoE itself writes: peft_adapters/ beside model weights is
dylora-separated. Subdirectories with adapters beside another mark (a trainer's checkpoint-N) decide nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from dylo_moe.errors import MissingFile, UnknownFormat
from dylo_moe.formats import dylora, native, peft_lora
from dylo_moe.formats.dylora_config import is_dylora_config
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.weights import dylora_pickles, find_weights, has_weights

FULL_STATE = "dylora-full-state"
BUNDLE = "dylora-bundle"
MERGED = "merged"
FORMATS = (
    native.FORMAT,
    dylora.FORMAT,
    FULL_STATE,
    BUNDLE,
    peft_lora.LORA_FORMAT,
    peft_lora.BAG_FORMAT,
    MERGED,
)
BUNDLE_FILE = "checkpoint.pt"
_KNOWN = f"one of {', '.join(FORMATS)}"
_OTHER_PEFT = {
    "XLORA": "PEFT X-LoRA",
    "MIXLORA": "MixLoRA",
    "LORAMOE": "MoE-PEFT LoRAMoE",
    "MOLA": "MoE-PEFT MoLA",
    "MOLE": "MoLE",
    "ADAMOLE": "AdaMoLE",
    "POLY": "PEFT Poly",
}


def detect(files: CheckpointFiles, path: Path) -> str:
    """The format's name; see detect_model_format."""
    if os.path.isfile(path):
        return _of_file(path)
    if not os.path.isdir(path):
        raise MissingFile(path, "", found="no such file or directory", expected="a checkpoint")
    found = _root_marks(files)
    if found == [dylora.FORMAT, "weights"]:
        files.warn("peft_adapters/ was read, the model weights beside it were not")
        found = [dylora.FORMAT]
    if len(found) > 1:
        expected = "one format; move the other files away"
        raise UnknownFormat(path, "", found=f"the marks of {' and '.join(found)}", expected=expected)
    if not found:
        return _of_subdirectories(files)
    beside = [directory.name for directory in peft_lora.adapter_directories(files.root)]
    if beside:
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
    if files.exists(root / "xlora_config.json"):
        raise _unsupported(root / "xlora_config.json", "X-LoRA")
    if files.exists(root / "adapter_config.json"):
        marks.append(_of_adapter(files))
    if files.exists(root / BUNDLE_FILE):
        marks.append(BUNDLE)
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
        raise _unsupported(path, _OTHER_PEFT.get(str(kind), f"peft_type {str(kind)[:40]}"))
    weights = files.root / "adapter_model.safetensors"
    if files.exists(weights):
        for key in files.header(weights):
            if ".lora_route." in key:
                raise _unsupported(weights, "LoRAMoE or HydraLoRA")
            if ".router.router." in key:
                raise _unsupported(weights, "MoLA")
    if "lora_nums" in config:
        raise _unsupported(path, "LoRAMoE or HydraLoRA")
    router = _router_file(files)
    if router:
        found = f"a LoRA and {router}"
        raise UnknownFormat(files.root, "", found=found, expected="a LoRA without router, or experts in peft_adapters/")
    return peft_lora.LORA_FORMAT


def _of_weights(files: CheckpointFiles) -> str:
    root = files.root
    config = files.read_json(root / "config.json") if files.exists(root / "config.json") else {}
    if isinstance(config.get("adapter_configs"), list) and "router_layers" in config:
        raise _unsupported(root / "config.json", "mergoo LoRA-MoE")
    weights = find_weights(files, root)
    if weights.is_pickled:
        is_plain = config.get("model_type") and not is_dylora_config(config) and weights.paths[0] not in dylora_pickles(root)
        return MERGED if is_plain else FULL_STATE
    if any(key.startswith("foundation_model.") for key in weights.header):
        return FULL_STATE
    foreign = [key for key in weights.header if ".lora_A." in key or ".lora_route." in key]
    if foreign:
        found = f"model weights with LoRA tensors, {foreign[0]}"
        raise UnknownFormat(weights.paths[0], "", found=found, expected=_KNOWN)
    if not config:
        raise UnknownFormat(root, "", found="model weights without config.json", expected=_KNOWN)
    return MERGED


def _of_subdirectories(files: CheckpointFiles) -> str:
    root = files.root
    names = [directory.name for directory in peft_lora.adapter_directories(root)]
    if "arrow_router" in names:
        raise _unsupported(root / "arrow_router", "PEFT Arrow")
    router = _router_file(files)
    if names and router:
        found = f"the adapters {', '.join(names[:8])} and {router}"
        raise UnknownFormat(root, "", found=found, expected="experts in peft_adapters/, or a bag of LoRAs without router")
    if names:
        return peft_lora.BAG_FORMAT
    names = [entry.name for entry in entries(root)]
    found = f"{', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else "an empty directory"
    raise UnknownFormat(root, "", found=found, expected=_KNOWN)


def _router_file(files: CheckpointFiles) -> str | None:
    return next((name for name in dylora.ROUTER_FILES if files.exists(files.root / name)), None)


def _unsupported(path: Path, name: str) -> UnknownFormat:
    return UnknownFormat(path, "", found=f"{name}, which is recognised but not supported", expected=_KNOWN)
