"""Every pair of formats in one directory: no directory matches two rules, and none is resolved by the order of writing.

Each format is written by its own writer; two of them are laid over each other in both orders. Where both use a file of one name
the later one replaces the earlier, as it would on a disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dylo_moe.errors import UnknownFormat
from dylo_moe.formats import FORMATS, detect_model_format, read_checkpoint
from tests.unit.formats.every_format import OPTIONS, write_every_format

# What real programs write into one directory, and what the directory then is.
RESOLVED = {
    frozenset({"dylora-separated", "dylora-full-state"}): "dylora-separated",  # D4c, a checkpoint of upstream's Trainer
    frozenset({"dylora-separated", "merged"}): "dylora-separated",
}
# Adapters in subdirectories decide nothing beside another mark: a trainer's checkpoint-N.
SUBDIRECTORIES = "lora-bag"
# What says which format it is; where the later directory brings these names, nothing of the earlier one's mark is left.
MARKS = {
    "dylo-moe": {"moe_config.json"},
    "dylora-separated": {"peft_adapters"},
    "dylora-full-state": {"model.safetensors"},
    "dylora-bundle": {"checkpoint.pt"},
    "mergoo": {"config.json", "model.safetensors"},
    "merged": {"config.json", "model.safetensors"},
    "xlora": {"xlora_config.json"},
    "peft-arrow": {"arrow_router"},
    "lora-bag": set(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    return write_every_format(tmp_path_factory.mktemp("pairs"))


def test_every_format_is_written_detected_and_read(written):
    assert set(written) == set(FORMATS)
    for name, path in written.items():
        assert detect_model_format(path) == name
        bundle = path / "checkpoint.pt"
        assert read_checkpoint(bundle if bundle.exists() else path, **OPTIONS.get(name, {})).format == name


def overlay(first: Path, second: Path, target: Path) -> Path:
    for path in (first, second):
        shutil.copytree(path, target, dirs_exist_ok=True)
    return target


def marks(name: str) -> set[str]:
    return MARKS.get(name, {"adapter_config.json", "adapter_model.safetensors"})


def allowed(first: str, second: str) -> set[str]:
    """The formats that a directory may be called which holds the first and then the second; else it must be refused."""
    pair = {first, second}
    if SUBDIRECTORIES in pair:
        return pair - {SUBDIRECTORIES}
    if frozenset(pair) in RESOLVED:
        return {RESOLVED[frozenset(pair)]}
    return {second} if marks(first) & marks(second) else set()


@pytest.mark.parametrize("first", FORMATS)
def test_two_formats_in_one_directory_are_refused_or_resolved_by_a_written_rule(written, tmp_path, first):
    refused = 0
    for second in FORMATS:
        if first == second:
            continue
        path = overlay(written[first], written[second], tmp_path / second)
        try:
            found = detect_model_format(path)
        except UnknownFormat as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert found in allowed(first, second), (first, second, found)
    assert refused or first == SUBDIRECTORIES
