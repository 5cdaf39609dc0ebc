"""The published design as a subject: plain loops, no cache, no dylo_moe. It must pass every law itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.loop import LoopModel
from harness.readings import read_artifact

STRATEGIES = ("router", "single:<i>", "best", "ensemble", "round_robin")


class NaiveLoopModel(LoopModel):
    """LoopModel that also generates, by recomputing the whole sequence for every token."""

    @torch.no_grad()
    def generate(  # noqa: PLR0913  a subset of transformers' own options
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strategy: str = "router",
        first_sample: int = 0,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        num_return_sequences: int = 1,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """(B, S) -> (B * num_return_sequences, S + new)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        experts = self._experts_of_rows(strategy, input_ids, mask, (first_sample, num_return_sequences))
        ids, mask = (t.repeat_interleave(num_return_sequences, dim=0) for t in (input_ids, mask))
        stop = self.config.eos_token_id if eos_token_id is None else eos_token_id
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        running = torch.ones(len(ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            probabilities = self._next_token(ids, mask, strategy, experts)
            token = torch.multinomial(probabilities, 1)[:, 0] if do_sample else probabilities.argmax(dim=-1)
            token = torch.where(running, token, 0 if pad is None else pad)
            ids = torch.cat([ids, token[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
            running = running & (token != stop)
            if not running.any():
                break
        return ids

    def _next_token(self, ids: Tensor, mask: Tensor, strategy: str, experts: Tensor | None) -> Tensor:
        """Next-token probabilities of every row, (B, V)."""
        if strategy != "ensemble":
            return torch.softmax(self(ids, mask, expert_id=experts).logits[:, -1].float(), dim=-1)
        passes = [self(ids, mask, expert_id=expert).logits[:, -1].float() for expert in range(self.num_experts)]
        return torch.stack([torch.softmax(logits, dim=-1) for logits in passes]).mean(dim=0)

    def _experts_of_rows(self, strategy: str, ids: Tensor, mask: Tensor, samples: tuple[int, int]) -> Tensor | None:
        """The expert of each returned row, (B * num_return_sequences,); None where no row has one expert of its own."""
        first, repeats = samples
        if strategy in ("router", "ensemble"):
            return None
        if strategy == "round_robin":
            return (first + torch.arange(len(ids) * repeats)) % self.num_experts
        if strategy == "best":
            return self._best(ids, mask).repeat_interleave(repeats)
        kind, _, number = strategy.partition(":")
        if kind != "single" or not number.isdecimal() or int(number) >= self.num_experts:
            legal = f"{', '.join(STRATEGIES)}, i from 0 to {self.num_experts - 1}"
            raise ValueError(f"strategy {strategy!r}, but should be one of {legal}")
        return torch.full((len(ids) * repeats,), int(number))

    def _best(self, ids: Tensor, mask: Tensor) -> Tensor:
        """For each row the expert with the lowest mean loss on its prompt, (B,)."""
        passes = [self(ids, mask, expert_id=expert).logits for expert in range(self.num_experts)]
        return torch.stack([self._prompt_loss(logits, ids, mask) for logits in passes]).argmin(dim=0)

    def _prompt_loss(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        taken = log_probabilities.gather(-1, ids[:, 1:, None])[..., 0]
        counted = mask[:, 1:] * mask[:, :-1]
        return -(taken * counted).sum(dim=1) / counted.sum(dim=1)


class NaiveLoopSubject:
    name = "naive-loop"
    model_class: type[nn.Module] = NaiveLoopModel
    formats = ("dylo-moe", "peft-xlora", "peft-arrow")

    def load(
        self,
        checkpoint: Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        assume: Mapping[str, object] | None = None,
    ) -> nn.Module:
        artifact = read_artifact(Path(checkpoint), base_model, assume)
        return self.model_class(artifact, as_dtype(dtype)).to(device)

    def detach(self, model: NaiveLoopModel) -> PreTrainedModel:
        return model.unwrapped()


def as_dtype(wanted: str | None) -> torch.dtype:
    """float32 unless named: the loop is the plain version of everything else."""
    return torch.float32 if wanted in (None, "auto") else getattr(torch, str(wanted).removeprefix("torch."))


def make() -> NaiveLoopSubject:
    return NaiveLoopSubject()
