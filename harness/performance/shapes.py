"""The models that are timed: a base of random weights, experts of rank 16, a gate; and what their shapes demand.

T tokens, E experts, k of them active, r rank, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig

from dylo_moe import load_checkpoint
from harness.measure import counted_flops
from harness.specimens import write_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint

RANK = 16
VOCABULARY = 4096
# Deep enough that the readout, which no expert touches, is a small share; shallow enough to be timed many times.
LAYERS = {256: 2, 512: 6, 1024: 3, 2048: 2}
CODEGEMMA = {"hidden_size": 2048, "num_hidden_layers": 18, "vocab_size": 256_000}


@dataclass(frozen=True)
class Shape:
    """top_k: experts per token; None for dense weights. targets: "attention" or "all-linear".

    autocast_adapter_dtype: as in PEFT; False leaves the experts in `dtype`.
    family: "llama", or "gemma", which with hidden=2048 has the shape of codegemma-2b.
    strength: factor on the experts, whose deltas have a quarter of the base's norm without it; with a small one the routed model
        predicts what the base does.
    """

    hidden: int = 1024
    targets: str = "attention"
    experts: int = 4
    top_k: int | None = None
    features: str = "embedding"
    dtype: str = "float32"
    longest: int = 2048
    strength: float = 1.0
    family: str = "llama"
    device: str = "cpu"
    autocast_adapter_dtype: bool = True

    @property
    def active(self) -> int:
        return self.experts if self.top_k is None else self.top_k

    @property
    def label(self) -> str:
        weights = "dense" if self.top_k is None else f"top-{self.top_k}"
        kind = "" if self.dtype == "float32" else f", {self.dtype}"
        family = "" if self.family == "llama" else f"{self.family} "
        return f"{family}d={self.hidden} {self.targets} E={self.experts} {weights}{kind}"

    @property
    def tags(self) -> dict[str, object]:
        return {**vars(self), "active": self.active}


@dataclass(frozen=True)
class Models:
    """The base alone, from its own files, and checkpoints on the same base."""

    shape: Shape
    base_path: Path
    checkpoint: Path

    @cached_property
    def base(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.base_path, dtype=self.shape.dtype).eval().to(self.shape.device)

    @cached_property
    def routed(self) -> nn.Module:
        options = {"device_map": self.shape.device, "autocast_adapter_dtype": self.shape.autocast_adapter_dtype}
        model = load_checkpoint(self.checkpoint, dtype=self.shape.dtype, **options).eval()
        for layer in model.routed_layers().values():
            for expand in layer.lora_B.values():
                expand.weight.data.mul_(self.shape.strength)
        if self.shape.top_k is not None:
            model.router.gate.bias.data.zero_()  # as large as in a specimen, it would choose the same few experts for every token
        return model

    def ids(self, tokens: int, rows: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(2, VOCABULARY, (rows, tokens), generator=generator).to(self.shape.device)

    @cached_property
    def expert_weights(self) -> int:
        """Numbers of A and B of one expert, r (I + O) summed over its Linears."""
        layers = self.routed.routed_layers().values()
        name = self.routed.expert_names[0]
        return sum(layer.lora_A[name].weight.numel() + layer.lora_B[name].weight.numel() for layer in layers)

    def work_limit(self, tokens: int) -> float:
        """Operations of the base pass, 2 T r (I + O) for each active expert and the gate, over those of the base pass."""
        base = self.base_flops(tokens)
        gate = 2 * tokens * self.shape.hidden * self.shape.experts
        return (base + 2 * tokens * self.shape.active * self.expert_weights + gate) / base

    def byte_limit(self) -> float:
        """Weights that a decoding step reads, with the active experts and without; a short cache is little."""
        base = sum(p.numel() for p in self.base.parameters())
        if not self.base.config.tie_word_embeddings:
            base -= self.base.get_input_embeddings().weight.numel()
        return (base + self.shape.active * self.expert_weights) / base

    def base_flops(self, tokens: int) -> int:
        ids = self.ids(tokens)
        with torch.inference_mode():
            return counted_flops(lambda: self.base(ids, use_cache=False))

    def base_pass(self, ids: Tensor) -> None:
        with torch.inference_mode():
            self.base(ids, use_cache=False)

    def routed_pass(self, ids: Tensor) -> None:
        with torch.inference_mode():
            self.routed(ids, use_cache=False)


def write_models(directory: Path, shape: Shape) -> Models:
    """A base that is there already, of the same shape, is taken."""
    base, top_k = _write_base(directory / "base", shape), shape.active
    path = directory / f"moe-{shape.targets}-{shape.experts}-{shape.features}"
    options = {"targets": shape.targets, "ranks": (RANK,), "alphas": (2 * RANK,), "num_experts": shape.experts}
    return Models(shape, base, write_checkpoint(path, base, features=shape.features, top_k=top_k, dtype=shape.dtype, **options))


def write_xlora_models(directory: Path, shape: Shape) -> Models:
    base = _write_base(directory / "base", shape)
    options = {"targets": shape.targets, "ranks": (RANK,), "alphas": (2 * RANK,), "num_experts": shape.experts}
    checkpoint = write_xlora_checkpoint(directory / "xlora", base, choices=XLoraChoices(), dtype=shape.dtype, **options)
    return Models(shape, base, checkpoint)


def _write_base(directory: Path, shape: Shape) -> Path:
    if not directory.exists():
        config = _gemma(shape) if shape.family == "gemma" else _llama(shape)
        with torch.random.fork_rng(devices=[]), torch.device(shape.device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
        model.save_pretrained(directory)
    return directory


def _llama(shape: Shape) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 43 // 16,
        num_hidden_layers=LAYERS[shape.hidden],
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        tie_word_embeddings=False,
        **_common(shape, VOCABULARY),
    )


def _gemma(shape: Shape) -> PretrainedConfig:
    is_whole = shape.hidden == CODEGEMMA["hidden_size"]
    return GemmaConfig(
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden,
        num_hidden_layers=CODEGEMMA["num_hidden_layers"] if is_whole else 2,
        num_attention_heads=shape.hidden // 256,
        num_key_value_heads=1,
        head_dim=256,
        **_common(shape, CODEGEMMA["vocab_size"] if is_whole else VOCABULARY),
    )


def _common(shape: Shape, vocabulary: int) -> dict[str, int | None]:
    positions = 4 * shape.longest
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return {"vocab_size": vocabulary, "max_position_embeddings": positions, **tokens}
