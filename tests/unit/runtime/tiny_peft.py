"""Tiny adapters of every kind, trained by nobody and written by stock PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 60
_SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_bases(root: Path) -> Path:
    """qwen: biases, an untied head; llama: a tied head; gpt2: Conv1D and LayerNorm."""
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    grouped = {**_SIZES, "num_key_value_heads": 1, **shared}
    for name, model in {
        "qwen": Qwen2ForCausalLM(Qwen2Config(**grouped, tie_word_embeddings=False)),
        "llama": LlamaForCausalLM(LlamaConfig(**grouped, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **shared)),
    }.items():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    return root


def write_adapter(directory: Path, base: Path | PreTrainedModel, seed: int, **config: Any) -> Path:
    """One adapter whose every trainable tensor has been moved away from where it started."""
    torch.manual_seed(seed)
    kind = AdaLoraConfig if "init_r" in config else LoraConfig
    model = get_peft_model(load(base), kind(task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def stock(directory: Path, base: Path | PreTrainedModel) -> PeftModel:
    return PeftModel.from_pretrained(load(base), directory).eval()


def load(base: Path | PreTrainedModel) -> PreTrainedModel:
    return base if isinstance(base, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(base)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits
