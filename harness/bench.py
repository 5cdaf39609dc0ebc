"""What a check is given: one checkpoint, one subject, the reference, and everything derived from them, each loaded
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.gate import Gate, load_gate
from harness.outcome import NotApplicable
from harness.packed import as_on_any_processor

# Prime and all different, so that a swapped or padded axis cannot pass unnoticed.
PROMPT_LENGTHS = (11, 7, 13, 5)


@dataclass
class Bench:
    """One checkpoint on the bench.

    Attributes:
        checkpoint: the directory being judged.
        subject: the implementation being judged (harness.subjects.protocol.Subject).
        base_model: the base model named on the command line, or None for the one that the checkpoint records.
        device: "cpu" or "cuda".
        load_dtype: the dtype asked for on the command line, or None for the checkpoint's own.
        assume: what the user stated because no file records it: any of lora_alpha, top_k, temperature, router_features.
        seed: of every random choice made by the checks.
        gate: thresholds for the checks whose limit is not arithmetic.
        kept: what a check computed that another check of the same checkpoint can use again.
    """

    checkpoint: Path
    subject: object
    base_model: str | None = None
    device: str = "cpu"
    load_dtype: str | None = None
    assume: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    gate: Gate = field(default_factory=load_gate)
    kept: dict[str, Any] = field(default_factory=dict, repr=False)
    _facts: dict[str, object] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The subject's model of this checkpoint, in eval mode, shared by every check: leave it as you found it."""
        return self.fresh_model()

    def fresh_model(self) -> torch.nn.Module:
        """Another load of the same checkpoint, for checks that change the model."""
        wanted = {"base_model": self.base_model, "device": self.device, "dtype": self.load_dtype}
        if self.assume:
            wanted["assume"] = dict(self.assume)
        return as_on_any_processor(self.subject.load(self.checkpoint, **wanted).eval())

    @cached_property
    def reference(self) -> object:
        """The judge's own float64 model (harness.reference), built from the files without the subject."""
        from harness.reference import load_reference  # only checks that need it pay for the import

        if self.assume:
            return load_reference(self.checkpoint, self.base_model, assume=dict(self.assume))
        return load_reference(self.checkpoint, self.base_model)

    @property
    def experts(self) -> object:
        """The experts as float64 arrays, in router-column order, from the reference."""
        return self.reference.experts

    @property
    def router(self) -> object:
        """The router as float64 arrays, or None, from the reference."""
        return self.reference.router

    @property
    def num_experts(self) -> int:
        """As the model says. Raises NotApplicable for a merged checkpoint, whose model is a plain one."""
        if not self.experts:
            raise NotApplicable("the checkpoint has no experts: there is nothing to mix")
        return self.model.num_experts

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the subject computes in: that of its first floating-point parameter."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def vocab_size(self) -> int:
        config = self.model.config
        return (config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size

    @cached_property
    def prompts(self) -> list[torch.Tensor]:
        """Four rows of random token ids of different lengths, each (length,), on the device; the same for every
        subject.
        """
        rng = self.rng(1)
        # The first ids are special tokens in every specimen and most tokenizers; end-of-text would stop generation
        # early.
        rows = [rng.integers(min(8, self.vocab_size // 2), self.vocab_size, size=length) for length in PROMPT_LENGTHS]
        return [torch.as_tensor(row, dtype=torch.long, device=self.device) for row in rows]

    def batch(self, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts as one batch: input_ids (4, 13) and attention_mask (4, 13), padded on `side`, "left" or "right"."""
        longest = max(PROMPT_LENGTHS)
        ids = torch.zeros(len(self.prompts), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            span = slice(longest - len(prompt), longest) if side == "left" else slice(0, len(prompt))
            ids[row, span], mask[row, span] = prompt, 1
        return ids, mask

    @cached_property
    def tokenizer(self) -> object:
        """The checkpoint's tokenizer, or its base model's. Raises NotApplicable where neither has one."""
        from transformers import AutoTokenizer

        for place in (self.checkpoint, self.base_model, getattr(self.reference, "base_path", None)):
            if place is not None and (Path(place) / "tokenizer_config.json").is_file():
                return AutoTokenizer.from_pretrained(place, local_files_only=True)
        raise NotApplicable("neither the checkpoint nor its base model has tokenizer files")

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Random numbers of this run's seed; different streams are independent."""
        return np.random.default_rng([self.seed, stream])

    def evidence(self, **facts: object) -> None:
        """Record facts about the running check in the verdict: numbers, text, and lists or dicts of them."""
        self._facts.update(facts)

    def take_evidence(self) -> dict[str, object]:
        """What was recorded since the last call; the plugin asks after every check."""
        facts, self._facts = self._facts, {}
        return facts
