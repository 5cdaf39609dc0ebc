"""What is wanted of a decoder, and how a strategy writes it: with which rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dylo_moe.batching import free_memory
from dylo_moe.memory import is_out_of_memory
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.routing import ADAPTERS_OFF, Off
from dylo_moe.strategies import Strategy, prompt_losses


@dataclass(frozen=True)
class Wanted:
    """One completion: sample `index`, from 0, of a prompt by a strategy. task_id is the caller's, and decides nothing."""

    prompt: str
    strategy: str
    index: int
    task_id: str = ""


@dataclass(frozen=True)
class Completion:
    """The text after the prompt, and how many tokens were written for it."""

    wanted: Wanted
    text: str
    tokens: int


def rows_of(strategy: Strategy, num_experts: int, index: int, best: Callable[[], int]) -> tuple[int | Off | None, ...]:
    """The routes of the rows that write sample `index`; see `batch.Request`. best: finds the prompt's best expert."""
    if strategy.kind == "router":
        return (None,)
    if strategy.kind == "base":
        return (ADAPTERS_OFF,)
    if strategy.kind == "ensemble":
        return tuple(range(num_experts))
    if strategy.kind == "round_robin":
        return (index % num_experts,)
    return (strategy.expert if strategy.kind == "single" else best(),)


@torch.no_grad()
def best_expert(model: DyLoRA_MoE, ids: Tensor) -> int:
    """The expert with the lowest loss on one prompt, ids (1, length); one after the other where memory does not take all."""
    try:
        return int(prompt_losses(model, ids)[0].argmin())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return int(torch.cat([prompt_losses(model, ids, experts=[e])[0] for e in range(model.num_experts)]).argmin())
