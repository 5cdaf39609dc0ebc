"""Tiny random base models, one per family of architectures, with their own tokenizers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from harness.specimens.vocabulary import train_tokenizer

POSITIONS = 2048


def _llama(shared: dict[str, int]) -> LlamaConfig:
    """Grouped-query attention, untied head."""
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **shared,
    )


def _gemma(shared: dict[str, int]) -> GemmaConfig:
    """Tied embeddings; heads * head_dim (64) is not the hidden size (40); norm weights are offsets from one."""
    return GemmaConfig(
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        **shared,
    )


def _gpt2(shared: dict[str, int]) -> GPT2Config:
    """Conv1D layers, which store weights as (in, out); learned positions; no dropout: train() stays comparable."""
    return GPT2Config(
        n_embd=44,
        n_inner=76,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **shared,
    )


def _qwen(shared: dict[str, int]) -> Qwen2Config:
    """Biases in the q, k and v projections; three layers."""
    return Qwen2Config(
        hidden_size=56,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **shared,
    )


_CONFIGS: dict[str, Callable[[dict[str, int]], PreTrainedConfig]] = {
    "llama": _llama,
    "gemma": _gemma,
    "gpt2": _gpt2,
    "qwen": _qwen,
}
FAMILIES = tuple(_CONFIGS)


def write_base(directory: str | Path, family: str, *, seed: int = 0, dtype: str = "float32", chat_template: bool = False) -> Path:
    """Writes a random causal language model of `family` (one of FAMILIES) and its tokenizer; returns the directory.

    The files are the same, byte for byte, whenever the arguments are the same, whatever the state of any global random
    generator, the thread count or the process. Weights are scaled to their fan-in, so that logits have a standard
    deviation of one to three: far above rounding, far from saturation.
    """
    directory = Path(directory)
    tokenizer = train_tokenizer(family, chat_template=chat_template)
    config = _CONFIGS[family](_shared_fields(tokenizer))
    with torch.random.fork_rng(devices=[]):  # from_config draws from the global generator; _fill replaces the values
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _shared_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _fill(model: nn.Module, seed: int) -> None:
    """Draws every parameter from its own generator, seeded by its name: no draw depends on the order of the others.

    NumPy rather than torch, whose normal draws differ between CPUs with and without AVX2.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            noise = torch.from_numpy(generator.standard_normal(tuple(parameter.shape)))
            parameter.copy_(_scaled(name, noise, model.config.model_type))


def _scaled(name: str, noise: Tensor, model_type: str) -> Tensor:
    if name.endswith(".bias"):
        return 0.1 * noise
    if noise.ndim == 1:
        return 0.2 * noise if model_type == "gemma" else 1 + 0.2 * noise
    if name.endswith("wpe.weight"):
        return 0.1 * noise
    if "embed_tokens" in name or name.endswith("wte.weight"):
        return noise * 2 / noise.shape[1] ** 0.5
    fan_in = noise.shape[0] if "transformer.h." in name else noise.shape[1]
    return noise * _gain(name, model_type) / fan_in**0.5


def _gain(name: str, model_type: str) -> float:
    if "lm_head" in name:
        return 2.5
    if model_type == "gemma" and ("o_proj" in name or "down_proj" in name):
        return 4.0  # Gemma multiplies embeddings by sqrt(hidden): with less from its layers, the model copies
    return 1.2
