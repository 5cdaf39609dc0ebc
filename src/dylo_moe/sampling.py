"""Choosing the next token ourselves: one draw per group of rows, from a stream of random numbers of the group's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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

Choice = Callable[[Tensor], Tensor]  # logits (rows, vocabulary) -> tokens (rows,)
_WARPERS = ("temperature", "top_k", "top_p", "min_p")
_UNSUPPORTED = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Candidates that are kept beyond the top k before the warpers see them: equal scores at the k-th place all stay.
_TIES = 64
_CHUNK = 64


class Uniforms:
    """Random numbers in [0, 1) of one group; they depend on the seed alone, however many are taken at a time."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    def take(self, count: int) -> Tensor:
        """The next ones, (count,), float64."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)


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
        self._streams = [Uniforms(seed) for seed in seeds or []]
        self._chunk: list[Tensor] = []  # of the next steps, (groups,) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (rows, length); scores: (rows, vocabulary) -> the same shape, -inf but for the chosen token."""
        chosen = self.foreseen(scores).repeat_interleave(self.group_size).unsqueeze(-1)
        if self.warpers is not None:
            self._chunk.pop()
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)

    def foreseen(self, scores: Tensor) -> Tensor:
        """What a call with these scores would choose, (groups,). It uses no random number up."""
        groups = group_scores(scores, self.group_size)
        return most_likely(groups) if self.warpers is None else draw_tokens(groups, self.warpers, self._uniforms())

    def _uniforms(self) -> Tensor:
        """Of the next draw."""
        if not self._chunk:
            self._chunk = list(torch.stack([stream.take(_CHUNK) for stream in self._streams], dim=1))[::-1]
        return self._chunk[-1]


def most_likely(logits: Tensor) -> Tensor:
    """A `Choice`."""
    return logits.argmax(dim=-1)


def foreseen_choice(config: GenerationConfig, options: dict[str, Any], *, samples: bool) -> Choice:
    """How `generate` with these options will choose the next tokens, with the random numbers that it will use, which stay unused.

    Not where options ask for warpers that are not known here: it is only foreseen then which tokens are the most likely.
    """
    draws = [processor for processor in options.get("logits_processor") or () if isinstance(processor, Draw)]
    if draws:
        return draws[-1].foreseen
    if not samples:
        return most_likely
    try:
        return partial(_drawn, warpers_from_options(config, options)[0])
    except RoutingError:
        return most_likely


def _drawn(warpers: LogitsProcessorList, logits: Tensor) -> Tensor:
    """As transformers draws from logits (rows, vocabulary), with a copy of torch's generator.

    torch.multinomial written out (ATen, the case of one sample): itself it refuses what another pass may never compute, as NaN.
    """
    device = logits.device
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    generator = torch.Generator(device).set_state(state)
    probabilities = torch.softmax(warpers(None, logits.float()), dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def group_scores(scores: Tensor, group_size: int) -> Tensor:
    """Log of the mean of the rows' distributions, (groups, vocabulary), float32; the scores themselves for groups of one."""
    if group_size == 1:
        return scores.float()
    logs = torch.log_softmax(scores.float(), dim=-1).view(-1, group_size, scores.shape[-1])
    return torch.logsumexp(logs, dim=1) - math.log(group_size)


def draw_tokens(scores: Tensor, warpers: LogitsProcessorList, uniforms: Tensor) -> Tensor:
    """One token per row, (rows,): where its distribution function passes the row's random number.

    Args:
        scores: (rows, vocabulary), logits or log-probabilities.
        warpers: from `warpers_from_options`.
        uniforms: (rows,), in [0, 1).
    """
    scores, tokens = _candidates(scores, warpers)
    probabilities = torch.softmax(warpers(None, scores), dim=-1)
    below = probabilities.double().cumsum(dim=-1)
    targets = uniforms.to(below.device)[:, None] * below[:, -1:]
    places = torch.searchsorted(below, targets, right=True).clamp(max=below.shape[-1] - 1)
    return places[:, 0] if tokens is None else tokens.gather(-1, places)[:, 0]


def _candidates(scores: Tensor, warpers: LogitsProcessorList) -> tuple[Tensor, Tensor | None]:
    """The scores that can survive a top k, in the order of their tokens, and these; sorting a whole vocabulary is slow."""
    kept = [warper.top_k + _TIES for warper in warpers if isinstance(warper, TopKLogitsWarper)]
    if not kept or kept[0] >= scores.shape[-1]:
        return scores, None
    tokens = scores.topk(kept[0], dim=-1).indices.sort(dim=-1).values
    return scores.gather(-1, tokens), tokens


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
