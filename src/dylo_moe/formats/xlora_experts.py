"""Where the experts of an X-LoRA checkpoint are, and reading them, also from what PEFT's save_pretrained leaves of them.

PEFT names the experts "0", "1", ... and, when it saves the subdirectory of expert i, takes the digit in ".i." for that name:

    up to 0.19   the expert's own tensors are all there, under keys that lost every ".i" (0.15) or only its name (0.18), beside
                 tensors of layer i, of the other experts and of the classifier: its own are read, the others are not
    from 0.20    its tensors in layers that are numbered like another expert are not there, base weights are: it is lost
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.errors import ExpertEmpty, ExpertMissing, ForeignTensor, InvalidField
from dylo_moe.formats.adapter import (
    Half,
    Pairs,
    build_expert,
    check_pairs,
    flat_tensors,
    infos,
    read_adapter,
    weights_file,
)
from dylo_moe.formats.adapter_config import AdapterConfig, read_adapter_config
from dylo_moe.formats.checkpoint import Expert
from dylo_moe.formats.files import CheckpointFiles, entries
from dylo_moe.formats.options import Adapters
from dylo_moe.formats.safetensors_file import TensorInfo

CLASSIFIER_MARK = "internal_xlora_classifier."
_SAVED = "base_model.lora_model.model."
_OWN = re.compile(re.escape(_SAVED) + r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# The number after "layers" is gone, or what is left of it sticks to the word: ".1" of "layers.12." leaves "layers2.".
_CUT = re.compile(r"(?P<container>(?:^|\.)(?:layers|blocks|h))(?P<rest>\d*)\.(?=\D)")
_GIVE = "adapters={name: directory}, or the directory that holds them"


@dataclass(frozen=True)
class Place:
    """One expert of a checkpoint: its name in `adapters`, the name it gets here, and where it was when it was trained."""

    key: str
    name: str
    recorded: str | None


def read_experts(files: CheckpointFiles, places: list[Place], given: Adapters) -> list[tuple[Expert, AdapterConfig]]:
    """The experts in the order of `places`.

    Args:
        given: directories that the user named; only these are opened outside of the checkpoint.

    Raises:
        ExpertMissing: an expert is nowhere; the message names the recorded path. ForeignTensor: PEFT 0.20 or later lost it.
        InvalidField: `given` names an expert that there is not, or two directories could be meant.
        CheckpointError: whatever read_adapter refuses.
    """
    named = _named(files, places, given)
    read = []
    for place in places:
        directory = named.get(place.key)
        if directory is not None:
            files.also_open(directory)
            read.append(read_adapter(files, directory, place.name))
        else:
            directory = _inside(files, place)
            read.append(_read_inside(files, directory, place))
        check_plain(read[-1][0], directory)
    return read


def check_plain(expert: Expert, where: Path) -> None:
    """Raises InvalidField for DoRA, and for biases and modules of an expert's own: X-LoRA weighs none of them."""
    special = any(pair.magnitude is not None or pair.bias is not None for pair in expert.modules.values())
    if special or expert.replaced or expert.biases:
        found = "DoRA, biases or whole modules of its own"
        raise InvalidField(where, expert.name, found=found, expected="a plain LoRA, all that X-LoRA mixes")


def _named(files: CheckpointFiles, places: list[Place], given: Adapters) -> dict[str, Path]:
    """Expert key -> directory, of those that the user named."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in {place.key for place in places}]
        if unknown:
            known = ", ".join(place.key for place in places)
            raise InvalidField(files.root, "adapters", found=f"the expert {unknown[0]!r}", expected=f"some of {known}")
        return {key: _adapter_directory(files, Path(directory), key) for key, directory in given.items()}
    found = {}
    for place in places:
        candidates = [Path(given) / name for name in _names(place)]
        directory = next((path for path in candidates if _is_adapter(path)), None)
        if directory is None:
            text = f"no {' and no '.join(str(path) for path in candidates)}"
            raise ExpertMissing(Path(given), place.key, found=text, expected="a directory with adapter_config.json")
        found[place.key] = directory
    return found


def _adapter_directory(files: CheckpointFiles, directory: Path, key: str) -> Path:
    if not _is_adapter(directory):
        found = f"{directory}, without adapter_config.json"
        raise ExpertMissing(files.root, f"adapters[{key}]", found=found, expected="the directory of a LoRA")
    return directory


def _inside(files: CheckpointFiles, place: Place) -> Path:
    """The expert's directory in the checkpoint: by its key, or by the last part of its recorded path; at most one level down."""
    for name in _names(place):
        if _is_adapter(files.root / name):
            return files.root / name
    below = [entry for entry in entries(files.root) if entry.is_dir() and not _is_adapter(entry)]
    for name in _names(place):
        found = [entry / name for entry in below if _is_adapter(entry / name)]
        if len(found) > 1:
            both = " and ".join(str(path.relative_to(files.root)) for path in found[:2])
            raise InvalidField(files.root, f"adapters[{place.key}]", found=both, expected=f"one of them, or {_GIVE}")
        if found:
            return found[0]
    where = f"recorded at {place.recorded}, which is not opened unbidden" if place.recorded else "it may lie elsewhere"
    found = f"no {' or '.join(_names(place))} in the checkpoint; {where}"
    raise ExpertMissing(files.root, f"adapters[{place.key}]", found=found, expected=_GIVE)


def _names(place: Place) -> list[str]:
    last = Path(place.recorded).name if place.recorded else ""
    return list(dict.fromkeys(name for name in (place.key, last) if name and name not in (".", "..")))


def _is_adapter(directory: Path) -> bool:
    return os.path.isfile(directory / "adapter_config.json")


def _read_inside(files: CheckpointFiles, directory: Path, place: Place) -> tuple[Expert, AdapterConfig]:
    path = weights_file(files, directory)
    tensors = None if path.suffix == ".safetensors" else flat_tensors(files.pickle(path), path)
    header = files.header(path) if tensors is None else infos(tensors)
    if not any(_SAVED in key or CLASSIFIER_MARK in key for key in header):
        return read_adapter(files, directory, place.name)
    config = read_adapter_config(files, directory / "adapter_config.json")
    pairs = check_pairs(_own_pairs(header, place, path), config, path)
    tensors = files.tensors(path) if tensors is None else tensors
    others = len(header) - 2 * len(pairs)
    files.warn(f"{files.relative(path)}: {others} tensors of other parts of the model beside the expert's own were not read")
    return build_expert(place.name, pairs, tensors, config, path), config


def _own_pairs(header: Mapping[str, TensorInfo], place: Place, file: Path) -> Pairs:
    """The expert's own pairs among what PEFT up to 0.19 saved. Raises ForeignTensor where a later PEFT lost them."""
    outside = [key for key in header if CLASSIFIER_MARK not in key and not _is_in_a_layer(key)]
    if outside:
        where = f", recorded at {place.recorded}" if place.recorded else ""
        found = "base weights, and of the expert not all layers: PEFT 0.20 and later save it so"
        expected = f"the expert alone; give the one that was trained{where}: {_GIVE}"
        raise ForeignTensor(file, outside[0], found=found, expected=expected)
    pairs: Pairs = {}
    for key, info in header.items():
        match = _OWN.fullmatch(key)
        if match is None:
            continue
        module = _CUT.sub(rf"\g<container>.{place.key}\g<rest>.", match["module"])
        halves = pairs.setdefault(module, {})
        if match["half"] in halves:
            raise ForeignTensor(file, key, found="the same tensor under two keys", expected="one")
        halves[match["half"]] = Half(key, info)
    if not pairs:
        raise ExpertEmpty(file, place.key, found="0 tensors of its own", expected="pairs of lora_A and lora_B")
    return pairs


def _is_in_a_layer(key: str) -> bool:
    return any(part.isdecimal() for part in key.split(".")) or _CUT.search(key) is not None


def modules_of(experts: Iterable[Expert]) -> set[str]:
    """Every module that some expert adapts: as many layers does a layerwise classifier speak to."""
    return {module for expert in experts for module in expert.modules}


def base_of(files: CheckpointFiles, recorded: str | None, configs: Iterable[AdapterConfig]) -> str | None:
    """The base that the checkpoint records; experts that were trained elsewhere may call it by another name."""
    others = [config.base_model for config in configs if config.base_model is not None]
    if recorded is None:
        return others[0] if others else None
    for other in dict.fromkeys(others):
        if other != recorded:
            files.warn(f"an expert records the base model {other}, the checkpoint {recorded}, which was taken")
    return recorded
