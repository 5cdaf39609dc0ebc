"""Every other format: converted into ours and saved from a loaded model, it has the same tensors and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylo_moe import load_checkpoint
from dylo_moe.conversion import convert_checkpoint, same_expert
from dylo_moe.formats import detect_model_format, read_checkpoint
from dylo_moe.inventory import take_inventory
from fixtures.adamole import write_adamole
from fixtures.gated import draw
from fixtures.loramoe import write_hydralora, write_loramoe
from fixtures.mergoo import write_mergoo
from fixtures.moe_peft import Recipe, write_moe_peft
from fixtures.mola import write_mola
from fixtures.poly import write_poly
from fixtures.xlora import write_standalone
from harness.specimens import write_base, write_checkpoint
from harness.specimens.arrow import write_arrow_checkpoint
from harness.specimens.xlora import XLoraChoices
from tests.unit.formats.states import same

IDS = torch.tensor([[5, 9, 33, 7, 21], [8, 2, 60, 3, 4]])
TARGETS = ("q_proj", "v_proj", "up_proj")


def mergoo(directory: Path, base: Path) -> Path:
    return write_mergoo(directory, draw(base, TARGETS))


def loramoe(directory: Path, base: Path) -> Path:
    return write_loramoe(directory, draw(base, TARGETS), pickled=False)


def hydralora(directory: Path, base: Path) -> Path:
    return write_hydralora(directory, draw(base, TARGETS, shared_a=True), pickled=False)


def mola(directory: Path, base: Path) -> Path:
    """Two experts in the first layer, three in the second: one gate has fewer rows."""
    return write_mola(directory, draw(base, TARGETS, experts=(2, 3), ranks=(4, 4)), pickled=False)


def adamole(directory: Path, base: Path) -> Path:
    return write_adamole(directory, draw(base, TARGETS), pickled=False, max_threshold=None)


def mixlora(directory: Path, base: Path) -> Path:
    return write_moe_peft(directory, base, Recipe("mixlora", safetensors=True))


def moe_peft_mola(directory: Path, base: Path) -> Path:
    return write_moe_peft(directory, base, Recipe("mola", safetensors=True))


def arrow(directory: Path, base: Path) -> Path:
    return write_arrow_checkpoint(directory, base)


def standalone(directory: Path, base: Path) -> Path:
    choices = XLoraChoices(xlora_depth=2, top_k_lora=2)
    return write_standalone(directory, base, ["code", "maths", "text"], choices)


def poly(directory: Path, base: Path) -> Path:
    write_poly(directory, base)
    return directory


def dora(directory: Path, base: Path) -> Path:
    """A native checkpoint whose experts have DoRA's magnitudes."""
    write_checkpoint(directory, base, num_experts=2)
    for expert in ("expert_0", "expert_1"):
        file, config = (directory / "experts" / expert / name for name in ("adapter_model.safetensors", "adapter_config.json"))
        tensors = load_file(file)
        for key in [key for key in tensors if ".lora_B." in key]:
            size = tensors[key].shape[0]
            tensors[key.replace(".lora_B.weight", ".lora_magnitude_vector")] = torch.rand(size) + 0.5
        save_file(tensors, file)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    return directory


Case = tuple[Callable[[Path, Path], Path], str, dict]
CASES: dict[str, Case] = {
    "mergoo": (mergoo, "mergoo", {}),
    "LoRAMoE": (loramoe, "loramoe", {}),
    "HydraLoRA": (hydralora, "hydralora", {}),
    "MoLA": (mola, "mola", {"top_k": (1, 2)}),
    "AdaMoLE": (adamole, "adamole", {}),
    "MixLoRA": (mixlora, "mixlora", {}),
    "MoLA of MoE-PEFT": (moe_peft_mola, "moe-peft-mola", {}),
    "Arrow": (arrow, "peft-arrow", {}),
    "standalone X-LoRA": (standalone, "xlora", {}),
    "Poly": (poly, "peft-poly", {}),
    "DoRA": (dora, "dylo-moe", {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


def logits(model):
    route = {} if model.router is not None else {"expert_id": 1}
    with torch.no_grad():
        return model(IDS, **route).logits


@pytest.mark.parametrize(("write", "name", "options"), CASES.values(), ids=CASES)
def test_format_becomes_ours_and_is_saved_with_the_same_tensors_and_logits(base, tmp_path, write, name, options):
    source = write(tmp_path / "in", base)
    assert detect_model_format(source) == name
    checkpoint = read_checkpoint(source, **options)
    named = str(base) if checkpoint.base_model is None and checkpoint.base_state is None else None
    made = read_checkpoint(convert_checkpoint(checkpoint, tmp_path / "out", to="dylora", base_model=named).path)
    original, converted = load_checkpoint(source, named, **options), load_checkpoint(tmp_path / "out")
    assert torch.equal(logits(original), logits(converted))
    if checkpoint.base_state is not None:
        assert detect_model_format(tmp_path / "out" / "base") == "merged"
    original.save_pretrained(tmp_path / "saved")
    for copy in (made, read_checkpoint(tmp_path / "saved")):
        assert len(copy.adapters) == len(checkpoint.adapters)
        assert all(map(same_expert, checkpoint.adapters, copy.adapters))
    assert same(checkpoint.router, made.router)
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved", base_model=str(base))), logits(original))
    assert take_inventory(made)["experts"]
