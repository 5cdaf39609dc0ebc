"""Texts through the router, into the document and the texts that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.errors import RoutingError, TaskSetError
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.routes.colours import Coloured
from dylo_moe.routes.measures import shares_of
from dylo_moe.routes.observing import ALL_LAYERS, experts_per_layer, layer_names, observe
from dylo_moe.routes.summary import summarise
from dylo_moe.routes.tally import Observation, Tally
from dylo_moe.routes.texts import Text
from dylo_moe.routes.tokens import Encoded, encode, pieces

SHOWN_TEXTS = 12
SHOWN_TOKENS = 600
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


def silently(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Says nothing, for use from Python."""
    yield from items


@dataclass(frozen=True)
class Analysis:
    """document: as `summary.summarise`, with the experts' names, the router and what was read. shown: the texts of a report."""

    document: dict[str, Any]
    shown: list[Coloured]


def analyse(
    decoder: PeftMoEDecoder,
    texts: Sequence[Text],
    *,
    batch_size: int = 8,
    shown_texts: int = SHOWN_TEXTS,
    track: Track = silently,
) -> Analysis:
    """What the router of a decoder's model does with texts.

    Args:
        batch_size: texts per pass, filled up on the left; it changes no number but by rounding.
        shown_texts: how many of the first ones to keep token by token.

    Raises:
        RoutingError: a model without a router. TaskSetError: no text has a token.
    """
    model = decoder.model
    if not isinstance(model, DyLoRA_MoE) or model.router is None:
        raise RoutingError(f"{decoder.name}: a model without a router, so there is no routing to look at")
    tasks = list(dict.fromkeys(text.task for text in texts))
    encoded = encode(decoder, texts, tasks)
    if not encoded.tokens:
        raise TaskSetError("no text has a single token")
    tally, kept = _observed(model, encoded, tasks, batch_size, shown_texts, track)
    layers = layer_names(model) if len(tally.here) > 1 else [ALL_LAYERS]
    document = {
        "experts": model.expert_names,
        "router": _router(model),
        "texts": {"texts": len(encoded.tokens), "cut": encoded.cut, "empty": len(texts) - len(encoded.tokens)},
        **summarise(tally, tasks=tasks, experts=model.expert_names, layers=layers),
    }
    return Analysis(document, [_shown(decoder, texts, encoded, number, kept[number]) for number in sorted(kept)])


def _observed(
    model: DyLoRA_MoE, encoded: Encoded, tasks: Sequence[str], batch_size: int, shown_texts: int, track: Track
) -> tuple[Tally, dict[int, Observation]]:
    longest = max(len(tokens.ids) for tokens in encoded.tokens)
    tally: Tally | None = None
    kept: dict[int, Observation] = {}
    for number, seen in track(observe(model, encoded.tokens, batch_size), len(encoded.tokens), "routing"):
        if tally is None:
            tally = Tally(len(tasks), _here(model, seen.weights.shape[1]), model.num_experts, longest)
        tally.add(seen)
        if number < shown_texts:
            kept[number] = replace(seen, weights=seen.weights[:SHOWN_TOKENS], before=None)
    return tally, kept


def _here(model: DyLoRA_MoE, layers: int) -> list[int]:
    """How many experts each layer has that the weights are of.

    Raises:
        RoutingError: not as many layers have spoken as are routed; their weights could not be told apart.
    """
    if layers == 1 and len(layer_names(model)) != 1:
        return [model.num_experts]
    names = layer_names(model)
    if len(names) != layers:
        raise RoutingError(f"weights of {layers} layers in one pass, but {len(names)} layers are routed")
    return experts_per_layer(model, names)


def _router(model: DyLoRA_MoE) -> dict[str, Any]:
    config = model.moe_config
    gates = list(model.router) if isinstance(model.router, nn.ModuleList) else [model.router]
    counts = {getattr(gate, "top_k", None) for gate in gates}
    return {
        "kind": config.router_type,
        "features": model.features,
        "level": config.routing_level,
        "top_k": counts.pop() if len(counts) == 1 else None,
    }


def _shown(decoder: PeftMoEDecoder, texts: Sequence[Text], encoded: Encoded, number: int, seen: Observation) -> Coloured:
    tokens = encoded.tokens[number]
    text = texts[encoded.kept[number]]
    several = sum(other.task == text.task for other in texts) > 1
    before = sum(other.task == text.task for other in texts[: encoded.kept[number]])
    return Coloured(
        name=f"{text.task}, sample {before}" if several else text.task,
        pieces=pieces(decoder.tokenizer, tokens.ids[:SHOWN_TOKENS]),
        shares=shares_of(seen.weights).mean(axis=1),
        prompt_length=tokens.prompt_length,
        left_out=max(len(tokens.ids) - SHOWN_TOKENS, 0),
    )
