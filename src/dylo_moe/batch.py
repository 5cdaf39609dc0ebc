"""Completions that are written together: rows of different prompts, tasks, samples and strategies, one token at a time.

Rows are padded on the left. A request has one row, or one for each expert of an ensemble; all its rows get the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from dylo_moe.penalties import Penalties
from dylo_moe.routing import ADAPTERS_OFF, Forced, Off, Routing
from dylo_moe.row_cache import drop_columns, join_rows, keep_rows, roomy_cache
from dylo_moe.row_routes import RowRoutes
from dylo_moe.sampling import Choice, Uniforms, draw_tokens, group_scores
from dylo_moe.stopping import Ending


@dataclass(frozen=True)
class Request:
    """One completion to write.

    Attributes:
        prompt: token ids.
        routes: of each of its rows: an expert, None for the router (or a model without experts), or ADAPTERS_OFF.
        limit: new tokens at most.
        seed: of its draws; None for greedy decoding.
    """

    prompt: tuple[int, ...]
    routes: tuple[int | Off | None, ...]
    limit: int
    seed: int | None = None

    @property
    def columns(self) -> int:
        return len(self.prompt) + self.limit


@dataclass(frozen=True)
class Setting:
    """What the requests of one call share.

    Attributes:
        model: all modules that take part.
        causal_lm: the transformers model in it.
        routing: its routing; None for a model without experts.
        ending: where texts end.
        penalties: what the generation configuration asks for.
        warpers: for draws; greedy requests ignore them.
        inputs: names of the arguments that the model's forward takes.
        can_pad: whether rows of different lengths can be in one batch.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    routing: Routing | None
    ending: Ending
    penalties: Penalties
    warpers: LogitsProcessorList
    inputs: frozenset[str]
    can_pad: bool

    def held(self) -> AbstractContextManager[None]:
        """Around passes between which nobody changes the model."""
        return nullcontext() if self.routing is None else self.routing.holding(self.model, {})


@dataclass
class Text:
    """What is written for a request so far. length: tokens of the finished text, None before its end."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    length: int | None = None
    uniforms: Uniforms | None = None

    def add(self, tokens: list[int], ending: Ending) -> int:
        """Takes new tokens in and returns how many of them were still wanted."""
        if self.length is not None:
            return 0
        seen = len(self.tokens)
        self.tokens += tokens[: self.request.limit - seen]
        self.length = ending.length(self.tokens, seen)
        if self.length is None and len(self.tokens) == self.request.limit:
            self.length = len(self.tokens)
        return len(self.tokens) - seen


class Batch:
    """Requests under way. All are greedy, or all draw; all have their adapters off, or none.

    Attributes:
        texts: of the requests, in the order of their rows.
        ids, mask: (rows, columns), the newest token in the last column. Padding repeats the row's first token: no penalty for
            tokens that were used sees another one.
    """

    def __init__(self, setting: Setting, requests: Sequence[Request]) -> None:
        self.setting = setting
        self.texts = [Text(request, uniforms=_uniforms(request)) for request in requests]
        self._lay_out()
        self.cache = roomy_cache(setting.causal_lm.config)
        self._arrange()
        self._logits: Tensor | None = self._forward(self.ids)

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def unfinished(self) -> list[Text]:
        return [text for text in self.texts if text.length is None]

    def advance(self, steps: int) -> int:
        """Writes up to `steps` tokens for every row and returns how many of them were wanted."""
        steps = min(steps, max((text.request.limit - len(text.tokens) for text in self.unfinished), default=0))
        if steps == 0:
            return 0
        streams = [text.uniforms.take(steps) for text in self.texts if text.uniforms is not None]
        uniforms = torch.stack(streams, dim=1) if streams else None
        for step in range(steps):
            self._step(None if uniforms is None else uniforms[step])
        new = self.ids[self._first_rows, -steps:].tolist()
        return sum(text.add(tokens, self.setting.ending) for text, tokens in zip(self.texts, new, strict=True))

    def shrink(self) -> None:
        """Lets finished rows leave, and the columns that only they had."""
        kept = [row for row, text in enumerate(self._text_of_row) if text.length is None]
        position = {row: place for place, row in enumerate(row for row, route in enumerate(self._routes) if route is None)}
        features = [position[row] for row in kept if row in position]
        rows, feature_rows = (torch.tensor(chosen, device=self.ids.device, dtype=torch.long) for chosen in (kept, features))
        keep_rows(self.cache, rows, feature_rows)
        self.ids, self.mask, self.positions, self.last_positions = (
            tensor[rows] for tensor in (self.ids, self.mask, self.positions, self.last_positions)
        )
        self.texts = self.unfinished
        unused = int(self.mask.argmax(dim=1).min())
        if unused and self.setting.can_pad:
            drop_columns(self.cache, unused)
            self.ids, self.mask = self.ids[:, unused:], self.mask[:, unused:]
        self._arrange()

    def join(self, other: Batch) -> None:
        """Takes the rows of another batch in, which has written at least one token and is of no more use."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        join_rows(self.cache, other.cache)
        self.ids = torch.cat([_padded(batch.ids, width, batch.ids[:, :1]) for batch in (self, other)])
        self.mask = torch.cat([_padded(batch.mask, width, torch.zeros_like(batch.mask[:, :1])) for batch in (self, other)])
        self.positions = torch.cat([self.positions, other.positions])
        self.last_positions = torch.cat([self.last_positions, other.last_positions])
        self.texts += other.texts
        self._arrange()

    def _lay_out(self) -> None:
        requests = [text.request for text in self.texts for _ in text.request.routes]
        width = max(len(request.prompt) for request in requests)
        padding = [width - len(request.prompt) for request in requests]
        rows = [[r.prompt[0]] * pad + list(r.prompt) for r, pad in zip(requests, padding, strict=True)]
        device = self.setting.causal_lm.device
        self.ids = torch.tensor(rows, device=device)
        self.mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(device)
        self.positions = torch.tensor([len(request.prompt) - 1 for request in requests], device=device)
        self.last_positions = torch.tensor([request.columns - 1 for request in requests], device=device)

    def _arrange(self) -> None:
        """What depends on which rows there are."""
        self._text_of_row = [text for text in self.texts for _ in text.request.routes]
        self._routes = [route for text in self.texts for route in text.request.routes]
        sizes = [len(text.request.routes) for text in self.texts]
        starts = [sum(sizes[:group]) for group in range(len(sizes))]
        device = self.ids.device
        self._first_rows = torch.tensor(starts, device=device)
        self._group_of_row = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        self._ensembles = [(group, starts[group], size) for group, size in enumerate(sizes) if size > 1]
        self._forced = _forced(self._routes, self.setting)

    def _step(self, uniforms: Tensor | None) -> None:
        """Writes one token for every row. uniforms: (requests,), for draws."""
        choose = partial(self._choose, uniforms=uniforms)
        with self._choosing(choose):
            logits = self._forward(self.ids[:, -1:]) if self._logits is None else self._logits
        self._logits = None
        self._write(choose(logits))

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        """Logits behind the last of these columns, (rows, vocabulary)."""
        setting, kept = self.setting, {"past_key_values": self.cache, "use_cache": True}
        if None in self._routes and setting.routing is not None and setting.routing.needs_whole_pass:
            ids, kept = self.ids, {"use_cache": False}
        back = torch.arange(1 - ids.shape[1], 1, device=ids.device)
        arguments: dict[str, Any] = {
            "position_ids": (self.positions[:, None] + back).clamp(min=0),
            "logits_to_keep": 1,
        }
        arguments = {name: value for name, value in arguments.items() if name in setting.inputs}
        with self._routed():
            output = setting.causal_lm(input_ids=ids, attention_mask=self.mask, return_dict=True, **kept, **arguments)
        return output.logits[:, -1]

    def _routed(self) -> AbstractContextManager[None]:
        routing = self.setting.routing
        return nullcontext() if routing is None else routing.forcing(self._forced)

    def _choosing(self, choose: Choice) -> AbstractContextManager[None]:
        routing = self.setting.routing
        return nullcontext() if routing is None else routing.choosing(choose)

    def _choose(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """The next token of each request, (requests,)."""
        scores = self.setting.penalties(self.ids, self.mask, logits.float())
        groups = scores[self._first_rows] if self._ensembles else scores
        for group, start, size in self._ensembles:
            groups[group] = group_scores(scores[start : start + size], size)[0]
        return groups.argmax(dim=-1) if uniforms is None else draw_tokens(groups, self.setting.warpers, uniforms)

    def _write(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[self._group_of_row, None]], dim=1)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        # Rows that are finished go on until they leave, but not beyond the positions that the model has.
        self.positions = torch.minimum(self.positions + 1, self.last_positions)


def _uniforms(request: Request) -> Uniforms | None:
    return None if request.seed is None else Uniforms(request.seed)


def _forced(routes: Sequence[int | Off | None], setting: Setting) -> Forced:
    """What to force for rows with these routes: as little as possible, because one expert for all is the fastest."""
    first = routes[0]
    if all(route is first or route == first for route in routes):
        return first
    if ADAPTERS_OFF in routes:
        raise ValueError("rows with and without adapters in one batch")
    if None in routes:
        return RowRoutes(routes, setting.routing.mixture.num_experts, setting.causal_lm.device)
    experts = torch.tensor(routes, device=setting.causal_lm.device)
    return torch.nn.functional.one_hot(experts, setting.routing.mixture.num_experts).to(torch.float32)


def _padded(tensor: Tensor, width: int, filler: Tensor) -> Tensor:
    """tensor (rows, columns) with filler (rows, 1) repeated on its left."""
    missing = width - tensor.shape[1]
    return torch.cat([filler.expand(-1, missing), tensor], dim=1) if missing else tensor
