"""Cells of loading, beside stock PEFT, which loads the same base and the same adapters one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylo_moe import attach_router, detach_router, load_checkpoint
from harness.performance.cells import Cell
from harness.performance.shapes import Models, Shape, write_models

GOAL = 1.0


def loading(quick: bool) -> Iterator[Cell]:
    """load_checkpoint / stock PEFT; attach_router and detach_router / stock PEFT."""
    for experts in (4,) if quick else (4, 16):
        with TemporaryDirectory() as directory:
            yield from _beside_peft(write_models(Path(directory), Shape(512, experts=experts)))


def _beside_peft(models: Models) -> Iterator[Cell]:
    loaded, router, config = _stock(models), models.routed.router, models.routed.moe_config
    work = {
        "load_checkpoint / stock PEFT": lambda: load_checkpoint(models.checkpoint),
        "attach_router / stock PEFT": lambda: detach_router(attach_router(loaded, router, config)),
    }
    for group, ours in work.items():
        yield Cell(group, models.shape.label, GOAL, ours=ours, other=lambda: _stock(models), tags=models.shape.tags)


def _stock(models: Models) -> PeftModel:
    folder = models.checkpoint / "experts"
    base = AutoModelForCausalLM.from_pretrained(models.base_path)
    model = PeftModel.from_pretrained(base, folder / "expert_0", "expert_0")
    for expert in range(1, models.shape.experts):
        model.load_adapter(folder / f"expert_{expert}", f"expert_{expert}")
    return model
