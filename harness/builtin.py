"""What the command judges when it is given no checkpoint: specimens that between them meet every kind of routing and
architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.readings.layouts import NATIVE
from harness.specimens import write_base, write_checkpoint
from harness.specimens.arrow import write_arrow_checkpoint
from harness.specimens.competence import plant
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint

MEASURED = ("speed.*", "memory.*")
# What random experts answer is nobody's known answer.
SCORED = ("evaluation.*",)
# They take long, and little of it depends on the architecture: compiling is judged on two specimens, decoding on one, and two
# or three will do for half precision and for more about generation than its texts.
COMPILED = ("training.compile_equal",)
DECODED = ("decoder.*",)
HALVED, GENERATED = ("precision.*",), ("generation.*",)
UNTOLD = MEASURED + SCORED + COMPILED + DECODED
# Work is counted in every format: each has its own passes.
DESCRIBED = SCORED + COMPILED + DECODED


@dataclass(frozen=True)
class Exhibit:
    """One thing to judge. `write` makes it in an empty directory and returns the checkpoint; `checks` are globs of ids, `without`
    too. layout: the format in which it is written.
    """

    name: str
    write: Callable[[Path], Path]
    checks: tuple[str, ...] = ("*",)
    without: tuple[str, ...] = ()
    is_users: bool = False
    layout: str = NATIVE

    def wants(self, check: str) -> bool:
        chosen, excluded = (any(fnmatchcase(check, glob) for glob in globs) for globs in (self.checks, self.without))
        return chosen and not excluded


def users_exhibit(checkpoint: Path) -> Exhibit:
    """The user's own checkpoint, with every check."""
    return Exhibit(checkpoint.name or str(checkpoint), lambda directory: checkpoint, is_users=True)


def _llama_base_features(directory: Path) -> Path:
    base = write_base(directory / "base", "llama", chat_template=True)
    return write_checkpoint(directory / "moe", base, num_experts=4, features="base")


def _gemma_bfloat16(directory: Path) -> Path:
    base = write_base(directory / "base", "gemma", dtype="bfloat16")
    options = {"features": "embedding", "targets": "all-linear", "dtype": "bfloat16"}
    return write_checkpoint(directory / "moe", base, num_experts=2, **options)


def _gpt2_rank_stabilised(directory: Path) -> Path:
    """Everything that a checkpoint records is another value than the one that an implementation may have written down."""
    base = write_base(directory / "base", "gpt2")
    recorded = {"temperature": 1.3, "balance": "switch", "aux_coefficient": 0.04, "top_k": 2, "use_rslora": True}
    return write_checkpoint(directory / "moe", base, num_experts=8, features="all_experts", **recorded)


def _qwen_twelve_experts(directory: Path) -> Path:
    """More than ten experts: names sorted as text put expert_10 before expert_2."""
    base = write_base(directory / "base", "qwen")
    return write_checkpoint(directory / "moe", base, num_experts=12, features="layer", top_k=3)


def _single_expert_without_router(directory: Path) -> Path:
    base = write_base(directory / "base", "llama", seed=1)
    return write_checkpoint(directory / "moe", base, num_experts=1, router=False)


def _xlora(directory: Path) -> Path:
    """Two Linears in the classifier, a decision per layer, and scalings that do not sum to 1."""
    choices = XLoraChoices(xlora_depth=2, layerwise_scalings=True, top_k_lora=2, softmax_temperature=0.8)
    return write_xlora_checkpoint(directory / "moe", write_base(directory / "base", "llama", seed=2), choices=choices)


def _arrow(directory: Path) -> Path:
    return write_arrow_checkpoint(directory / "moe", write_base(directory / "base", "llama", seed=3), num_experts=3)


def _large_enough_to_time(directory: Path) -> Path:
    """Hidden 384, 4 layers, 8 experts: 0.9 GFLOP per 128 tokens, so that arithmetic and not Python decides the times."""
    write_timing_base(directory / "base")
    options = {"targets": "all-linear", "ranks": (8, 16), "alphas": (16, 32)}
    return write_checkpoint(directory / "moe", directory / "base", num_experts=8, features="base", **options)


def write_timing_base(directory: Path, *, hidden_size: int = 384, layers: int = 4) -> Path:
    """A Llama for timing: random weights, no tokenizer. The draw may differ between releases of torch; nothing depends on it."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        vocab_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _planted_competence(directory: Path) -> Path:
    """Experts that know disjoint programming tasks by heart, so that every score is known beforehand."""
    return plant(directory, tasks_per_expert=2).checkpoint


BUILT_IN = (
    Exhibit("llama, 4 experts, base features", _llama_base_features, without=MEASURED + SCORED),
    Exhibit(
        "gemma, 2 experts, bfloat16, embedding features, all linear",
        _gemma_bfloat16,
        without=MEASURED + SCORED + DECODED + GENERATED,
    ),
    Exhibit("gpt2, 8 experts, mixed ranks, rsLoRA, top-2", _gpt2_rank_stabilised, without=UNTOLD + HALVED + GENERATED),
    Exhibit("qwen, 12 experts, a router decision per layer, top-3", _qwen_twelve_experts, without=UNTOLD + HALVED + GENERATED),
    Exhibit("llama, 1 expert, no router", _single_expert_without_router, without=UNTOLD + HALVED + GENERATED),
    Exhibit("llama, 4 experts, PEFT X-LoRA, layerwise, top-2", _xlora, without=DESCRIBED, layout="peft-xlora"),
    Exhibit("llama, 3 experts, PEFT Arrow, top-2", _arrow, without=DESCRIBED + HALVED + GENERATED, layout="peft-arrow"),
    Exhibit("llama, 8 experts, large enough to time", _large_enough_to_time, checks=MEASURED),
    Exhibit("planted competence, 3 experts that know disjoint tasks", _planted_competence, checks=("evaluation.*",)),
)


def exhibits_for(subject: object) -> tuple[Exhibit, ...]:
    """Those that are written in a format which the subject says it reads; the native one where it says nothing."""
    return tuple(exhibit for exhibit in BUILT_IN if exhibit.layout in getattr(subject, "formats", (NATIVE,)))
