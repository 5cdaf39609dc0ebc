"""Choosing the next token ourselves: one draw per group of rows, from a generator of the group's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dylo_moe.errors import RoutingError

_WARPERS = ("temperature", "top_k", "top_p", "min_p")
_UNSUPPORTED = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


class Draw(LogitsProcessor):
    """The last logits processor: leaves exactly one token possible, so that `generate`'s own argmax picks it.

    Rows come in consecutive groups. A group's distribution is the mean of its rows' distributions, and all of its rows
    get the one token drawn from it. With groups of one this is plain sampling whose draws do not depend on the other rows.

    Args:
        group_size: rows per group.
        warpers: applied to the group's log-probabilities before the draw; None for greedy.
        seeds: one per group; needed with warpers.
    """

    def __init__(self, group_size: int, warpers: LogitsProcessorList | None, seeds: list[int] | None) -> None:
        self.group_size = group_size
        self.warpers = warpers
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds or []]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (rows, length); scores: (rows, vocabulary) -> the same shape, -inf but for the chosen token."""
        tokens = self.choose(input_ids[:: self.group_size], self.group_scores(scores))
        chosen = tokens.repeat_interleave(self.group_size).unsqueeze(-1)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)

    def group_scores(self, scores: Tensor) -> Tensor:
        """Log of the mean of the rows' distributions, (groups, vocabulary), float32; the scores themselves for groups of one."""
        if self.group_size == 1:
            return scores.float()
        logs = torch.log_softmax(scores.float(), dim=-1).view(-1, self.group_size, scores.shape[-1])
        return torch.logsumexp(logs, dim=1) - math.log(self.group_size)

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One token per group, (groups,)."""
        if self.warpers is None:
            return scores.argmax(dim=-1)
        probabilities = torch.softmax(self.warpers(input_ids, scores), dim=-1).cpu()
        draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, self.generators, strict=True)]
        return torch.cat(draws).to(scores.device)


def warpers_from_options(config: GenerationConfig, options: dict[str, Any]) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """The warpers that `generate` would build from these options, and the options without them.

    Raises:
        RoutingError: an option that this way of sampling does not offer.
    """
    config = options.get("generation_config") or config
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise RoutingError(f"{name} is not available here; use temperature, top_k, top_p or min_p")
    values = {name: options.get(name, getattr(config, name, None)) for name in _WARPERS}
    warpers = LogitsProcessorList()
    if values["temperature"] not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(values["temperature"])))
    if values["top_k"]:
        warpers.append(TopKLogitsWarper(int(values["top_k"])))
    if values["top_p"] is not None and values["top_p"] < 1:
        warpers.append(TopPLogitsWarper(float(values["top_p"])))
    if values["min_p"] is not None:
        warpers.append(MinPLogitsWarper(float(values["min_p"])))
    return warpers, {name: value for name, value in options.items() if name not in _WARPERS}
