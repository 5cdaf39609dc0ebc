"""The ways to use the experts of a model while generating, and the one to leave them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from dylo_moe.errors import RoutingError, UnknownStrategy
from dylo_moe.mixture import Mixture
from dylo_moe.routing import ADAPTERS_OFF, Forced, Routing
from dylo_moe.sampling import Draw, foreseen_choice, warpers_from_options

STRATEGIES = ("router", "single:<i>", "best", "ensemble", "round_robin", "base")


class RoutedModel(Protocol):
    """What a strategy needs of a model."""

    causal_lm: PreTrainedModel
    mixture: Mixture
    routing: Routing
    router: nn.Module | None
    num_experts: int


@dataclass(frozen=True)
class Strategy:
    """kind: a name of STRATEGIES, "single" without its number, or "given"; expert: of "single:<i>"; route: what is given."""

    kind: str
    expert: int | None = None
    route: int | Tensor | None = None


def parse_strategy(text: str, num_experts: int, *, has_router: bool = True) -> Strategy:
    """Raises UnknownStrategy, naming the strategies that this model can run."""
    legal = ["router"] if has_router else []
    if num_experts:
        legal += [f"single:0..single:{num_experts - 1}", "best", "ensemble", "round_robin", "base"]
    kind, colon, index = text.partition(":") if isinstance(text, str) else (text, "", "")
    if kind == "single" and colon and index.isascii() and index.isdigit() and int(index) < num_experts:
        return Strategy("single", int(index))
    if not colon and ((kind == "router" and has_router) or (num_experts and kind in legal)):
        return Strategy(kind)
    raise UnknownStrategy(f"routing strategy {text!r}, but should be one of {', '.join(legal)}")


def generate_with_strategy(
    model: RoutedModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    chosen: Strategy,
    *,
    first_sample: int,
    seeds: list[int] | None,
    options: dict[str, Any],
) -> Any:
    """`causal_lm.generate` under a strategy; see `DyLoRA_MoE.generate`."""
    if input_ids is None and (chosen.kind in ("best", "ensemble") or seeds is not None):
        raise RoutingError(f"strategy {chosen.kind!r} needs input_ids")
    if chosen.kind == "ensemble":
        return _ensemble(model, input_ids, attention_mask, seeds, options)
    rows = _returned_rows(model, input_ids, options)
    route: Forced = chosen.route
    if chosen.kind == "base":
        route = ADAPTERS_OFF
    elif chosen.kind == "single":
        route = chosen.expert
    elif chosen.kind == "round_robin":
        if _option(model, options, "num_beams", 1) != 1 and _option(model, options, "num_return_sequences", 1) != 1:
            raise RoutingError("num_beams with several returned rows is not available with the strategy 'round_robin'")
        route = (first_sample + torch.arange(rows)) % model.num_experts
    elif chosen.kind == "best":
        route = best_experts(model, input_ids, attention_mask)
        route = int(route) if route.numel() == 1 else route
    if seeds is not None:
        input_ids, attention_mask, options = _seeded(model, input_ids, attention_mask, rows, seeds, options)
        if chosen.kind == "best" and isinstance(route, Tensor):
            route = route.repeat_interleave(rows // len(route))
    choice = foreseen_choice(model.causal_lm.generation_config, options, samples=_samples(model, options))
    with model.routing.forcing(route), model.routing.holding(model, options), model.routing.choosing(choice):
        return model.causal_lm.generate(input_ids, attention_mask=attention_mask, **_passed_on(model, options))


def _passed_on(model: RoutedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Without a cache, whatever was asked for, where the router decides by all tokens of a pass: it would be refused."""
    uncached = model.mixture.forced is None and model.routing.needs_whole_pass
    return {**options, "use_cache": False} if uncached else options


@torch.no_grad()
def best_experts(model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The expert with the lowest mean loss on each prompt, (batch,); the first of equals."""
    return prompt_losses(model, input_ids, attention_mask).argmin(dim=-1)


@torch.no_grad()
def prompt_losses(
    model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None = None, *, experts: Sequence[int] | None = None
) -> Tensor:
    """Mean next-token loss of each prompt under each expert alone, (batch, experts), in one pass over batch * experts rows.

    Padding does not count; a prompt of one token has loss 0 everywhere. experts: these only; None for all of them.
    """
    asked = range(model.num_experts) if experts is None else experts
    rows, count = input_ids.shape[0], len(asked)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids, mask = (tensor.repeat_interleave(count, dim=0) for tensor in (input_ids, mask))
    with model.routing.forcing(torch.tensor(list(asked)).repeat(rows)):
        logits = model.causal_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    counts = (mask[:, 1:] * mask[:, :-1]).to(losses.dtype)
    return ((losses * counts).sum(-1) / counts.sum(-1).clamp(min=1)).view(rows, count)


def _ensemble(
    model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None, seeds: list[int] | None, options: dict
) -> Tensor:
    """One row per expert; each step every row of a group gets the same token, drawn from the mean of their distributions."""
    for refused in ("num_beams", "streamer", "return_dict_in_generate", "assistant_model", "prompt_lookup_num_tokens"):
        value = _option(model, options, refused, None)
        if value and not (refused == "num_beams" and value == 1):
            raise RoutingError(f"{refused} is not available with the strategy 'ensemble'")
    experts = model.num_experts
    rows = _returned_rows(model, input_ids, options)
    if seeds is None and _samples(model, options):
        seeds = torch.randint(2**62, (rows,)).tolist()
    input_ids, attention_mask, options = _seeded(model, input_ids, attention_mask, rows, seeds, options, group_size=experts)
    with model.routing.forcing(torch.arange(experts).repeat(rows)), model.routing.holding(model, options):
        output = model.causal_lm.generate(input_ids, attention_mask=attention_mask, **options)
    return output[::experts]


def _seeded(
    model: RoutedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    rows: int,
    seeds: list[int] | None,
    options: dict[str, Any],
    *,
    group_size: int = 1,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Inputs and options of a generation whose tokens our own Draw chooses, one group of rows per returned row."""
    sampling = _samples(model, options)
    if sampling and (seeds is None or len(seeds) != rows):
        raise RoutingError(f"{0 if seeds is None else len(seeds)} seeds for {rows} returned rows, but should be one each")
    if _option(model, options, "num_beams", 1) != 1:
        raise RoutingError("num_beams is not available with seeds")
    warpers, options = warpers_from_options(model.causal_lm.generation_config, options)
    draw = Draw(group_size, warpers if sampling else None, seeds)
    repeats = rows // input_ids.shape[0] * group_size
    options |= {
        "do_sample": False,
        "num_return_sequences": 1,
        "logits_processor": LogitsProcessorList([*(options.get("logits_processor") or []), draw]),
    }
    ids = input_ids.repeat_interleave(repeats, dim=0)
    mask = None if attention_mask is None else attention_mask.repeat_interleave(repeats, dim=0)
    return ids, mask, options


def _option(model: RoutedModel, options: dict[str, Any], name: str, default: Any) -> Any:
    for source in (options.get(name), getattr(options.get("generation_config"), name, None)):
        if source is not None:
            return source
    value = getattr(model.causal_lm.generation_config, name, None)
    return default if value is None else value


def _samples(model: RoutedModel, options: dict[str, Any]) -> bool:
    return bool(_option(model, options, "do_sample", False))


def _returned_rows(model: RoutedModel, input_ids: Tensor | None, options: dict[str, Any]) -> int:
    prompts = input_ids if input_ids is not None else options.get("inputs_embeds")
    batch = 1 if prompts is None else prompts.shape[0]
    return batch * int(_option(model, options, "num_return_sequences", 1))
