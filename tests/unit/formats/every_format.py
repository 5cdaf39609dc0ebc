"""One checkpoint of every format, for tests that go through all of them."""

from __future__ import annotations

from pathlib import Path

from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

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

# What a caller must say where the files do not.
OPTIONS = {"mola": {"top_k": 2}, "dylora-full-state": {"lora_alpha": 8}}


def write_every_format(root: Path) -> dict[str, Path]:
    """format -> a directory of it below `root`, each by its own writer, all on one tiny base."""
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
