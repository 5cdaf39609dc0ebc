"""The specimens' experts in stock PEFT, and their gate, both loaded without dylo_moe's own loader."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dylo_moe import DynamicHybridRouter

E = 4


def stock_peft(checkpoint: Path, base: Path, *, trainable: bool = True) -> PeftModel:
    """The checkpoint's experts in stock PEFT, by PEFT's own loader."""
    experts = sorted((checkpoint / "experts").iterdir(), key=lambda p: int(p.name.rpartition("_")[2]))
    base_model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(base_model, experts[0], adapter_name=experts[0].name, is_trainable=trainable)
    for path in experts[1:]:
        model.load_adapter(path, adapter_name=path.name)
    return model.eval()


def gate_of(checkpoint: Path) -> DynamicHybridRouter:
    tensors = load_file(checkpoint / "router.safetensors")
    router = DynamicHybridRouter(tensors["gate.weight"].shape[1], tensors["gate.weight"].shape[0])
    router.gate.weight.data, router.gate.bias.data = tensors["gate.weight"], tensors["gate.bias"]
    return router.eval()
