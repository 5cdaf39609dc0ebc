"""Every pair of formats in one directory: no directory matches two rules, and none is resolved by the order of writing.

Each format is written by its own writer; two of them are laid over each other in both orders. Where both use a file of one name
the later one replaces the earlier, as it would on a disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dylo_moe.errors import UnknownFormat
from dylo_moe.formats import FORMATS, detect_model_format, read_checkpoint
from fixtures.adamole import write_adamole
from fixtures.gated import draw
from fixtures.layouts import write_layout
from fixtures.loramoe import write_hydralora, write_loramoe
from fixtures.mergoo import write_mergoo
from fixtures.moe_peft import Recipe, write_moe_peft
from fixtures.mola import write_mola
from fixtures.poly import write_poly
from fixtures.xlora import write_standalone
from harness.specimens import write_base, write_checkpoint
from harness.specimens.arrow import write_arrow_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint

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
    root = tmp_path_factory.mktemp("pairs")
    base = write_base(root / "base", "llama")
    gated = draw(base, ("q_proj", "v_proj"))
    shared = draw(base, ("q_proj", "v_proj"), shared_a=True)
    layouts = {"dylora-separated": "D5", "dylora-full-state": "D2", "dylora-bundle": "Dt"}
    layouts |= {name: name for name in ("peft-lora", "lora-bag", "merged")}
    made = {name: write_layout(root / name, base, layout, num_experts=2) for name, layout in layouts.items()}
    made["dylo-moe"] = write_checkpoint(root / "dylo-moe", base, num_experts=2)
    made["peft-xlora"] = write_xlora_checkpoint(root / "peft-xlora", base, num_experts=2)
    (root / "xlora").mkdir()
    made["xlora"] = write_standalone(root / "xlora", base, ["code", "maths"], XLoraChoices())
    made["peft-arrow"] = write_arrow_checkpoint(root / "peft-arrow", base, num_experts=2)
    made["peft-poly"] = write_poly(root / "peft-poly", base)
    made["peft-adalora"] = adalora(root / "peft-adalora", base)
    made["mergoo"] = write_mergoo(root / "mergoo", gated)
    made["loramoe"] = write_loramoe(root / "loramoe", gated, pickled=False)
    made["hydralora"] = write_hydralora(root / "hydralora", shared, pickled=False)
    made["mola"] = write_mola(root / "mola", draw(base, ("q_proj",), experts=(2, 3), ranks=(4, 4)), pickled=False)
    made["adamole"] = write_adamole(root / "adamole", gated, pickled=False, top_k=2)
    for strategy, name in (("mixlora", "mixlora"), ("loramoe", "moe-peft-loramoe"), ("mola", "moe-peft-mola")):
        made[name] = write_moe_peft(root / name, base, Recipe(strategy, safetensors=True))
    return {name: path.parent if path.is_file() else path for name, path in made.items()}


def adalora(directory: Path, base: Path) -> Path:
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return directory


def test_every_format_is_written_detected_and_read(written):
    assert set(written) == set(FORMATS)
    for name, path in written.items():
        assert detect_model_format(path) == name
        options = {"mola": {"top_k": 2}, "dylora-full-state": {"lora_alpha": 8}}.get(name, {})
        bundle = path / "checkpoint.pt"
        assert read_checkpoint(bundle if bundle.exists() else path, **options).format == name


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
