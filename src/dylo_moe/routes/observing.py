"""The routing weights of texts: one pass over prompt and completion together, in batches, one batch in memory at a time.

A causal model's weights at a token do not depend on later tokens, so they are the weights that generating the text had.
Shapes: B batch, S sequence, L routed layers, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dylo_moe.errors import RoutingError
from dylo_moe.feed_forward import RoutedFeedForward
from dylo_moe.gates import LayerGate
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.routed import RoutedLinear
from dylo_moe.router import DynamicHybridRouter
from dylo_moe.routes.tally import Observation
from dylo_moe.row_cache import can_pad

ALL_LAYERS = "all layers"


@dataclass(frozen=True)
class Tokens:
    """Token ids of one text, prompt and completion, of the task with this number."""

    task: int
    ids: list[int]
    prompt_length: int


def observe(model: DyLoRA_MoE, texts: Sequence[Tokens], batch_size: int) -> Iterator[tuple[int, Observation]]:
    """(number of the text, what the router made of it), the longest texts first; padding is left out.

    A batch that does not fit into memory is halved, down to one text. Where a model cannot be padded, only texts of one length
    share a batch.

    Raises:
        RoutingError: the model has no router.
    """
    if model.router is None:
        raise RoutingError("this model has no router, so there is no routing to look at")
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
    size = 1 if model.routing.needs_whole_pass else batch_size  # else a text's weights would depend on those beside it
    padded = can_pad(model.causal_lm)
    alike = groupby(order, key=lambda number: 0 if padded else len(texts[number].ids))
    for together in (list(numbers) for _, numbers in alike):
        for start in range(0, len(together), size):
            numbers = together[start : start + size]
            yield from zip(numbers, _observe_batch(model, [texts[number] for number in numbers]), strict=True)


def _observe_batch(model: DyLoRA_MoE, texts: Sequence[Tokens]) -> list[Observation]:
    try:
        return _pass(model, texts)
    except torch.OutOfMemoryError:
        if len(texts) == 1:
            raise
    middle = len(texts) // 2  # outside of the except block, which would keep the failed pass's tensors alive
    return _observe_batch(model, texts[:middle]) + _observe_batch(model, texts[middle:])


@torch.no_grad()
def _pass(model: DyLoRA_MoE, texts: Sequence[Tokens]) -> list[Observation]:
    ids, mask = left_padded([text.ids for text in texts])
    options = {"logits_to_keep": 1} if _head_can_be_short(model) else {}  # logits are not wanted: (B, S, vocabulary) is large
    with before_selection(model.router) as before:
        model(ids.to(model.device), mask.to(model.device), use_cache=False, **options)
    weights = _per_layer(model.last_routing_weights)
    early = torch.stack([before[index] for index in sorted(before)], dim=2) if before else None
    return [
        Observation(
            task=text.task,
            weights=_of_row(weights, row, len(text.ids)),
            prompt_length=text.prompt_length,
            before=None if early is None else _of_row(early, row, len(text.ids)),
        )
        for row, text in enumerate(texts)
    ]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, S), filled up on the left."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return ids, mask


def _per_layer(weights: Tensor) -> Tensor:
    return weights if weights.dim() == 4 else weights.unsqueeze(2)


def _of_row(weights: Tensor, row: int, length: int) -> np.ndarray:
    return weights[row, -length:].double().cpu().numpy()


def _head_can_be_short(model: DyLoRA_MoE) -> bool:
    """Not where experts are on the head: its gate would then see other tokens than the layers below."""
    takes = "logits_to_keep" in inspect.signature(model.causal_lm.forward).parameters
    return takes and not any(layer.is_readout for layer in model.routed_layers().values())


@contextmanager
def before_selection(router: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collects, in passes inside, the shares of all experts before the top k were chosen: gate's number -> (B, S, E).

    What is left after the choice says little: with top_k = 1 the weight is 1, however sure the router is. Empty for routers that
    choose nothing, or by another rule. For DyLoRA-MoE's router it is what training uses: softmax(logits / temperature).
    """
    found: dict[int, Tensor] = {}
    hooks = [gate.gate.register_forward_hook(_Keeper(gate, index, found)) for index, gate in enumerate(_selecting(router))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Keeper:
    """A forward hook of one gate's Linear."""

    def __init__(self, gate: nn.Module, index: int, found: dict[int, Tensor]) -> None:
        self.gate, self.index, self.found = gate, index, found

    def __call__(self, module: nn.Module, inputs: tuple, logits: Tensor) -> None:
        rule = getattr(self.gate, "rule", None)
        if rule == "arrow":
            logits = logits.abs()
        if rule in (None, "arrow"):  # the other rules have no temperature
            logits = logits / self.gate.temperature
        shares = torch.softmax(logits.detach(), dim=-1)
        self.found[self.index] = F.pad(shares, (0, self.gate.num_experts - shares.shape[-1]))


def _selecting(router: nn.Module) -> list[nn.Module]:
    """The gates whose shares before the choice are known; none unless all gates choose."""
    if isinstance(router, DynamicHybridRouter):
        return [router] if router.top_k < router.num_experts else []
    gates = list(router) if isinstance(router, nn.ModuleList) else []
    return gates if gates and all(_selects(gate) for gate in gates) else []


def _selects(gate: nn.Module) -> bool:
    return isinstance(gate, LayerGate) and gate.top_k is not None and gate.rule in ("softmax_topk", "topk_softmax", "arrow")


def layer_names(model: DyLoRA_MoE) -> list[str]:
    """The routed layers in the order of per-layer weights."""
    modules = model.causal_lm.named_modules()
    places = {m.index: name for name, m in modules if isinstance(m, RoutedLinear | RoutedFeedForward) and m.index is not None}
    return [places[index] for index in sorted(places)]


def experts_per_layer(model: DyLoRA_MoE, layers: Iterable[str]) -> list[int]:
    """How many experts each layer has: fewer than all where a gate has fewer outputs, as in MoLA."""
    layers = list(layers)
    if isinstance(model.router, nn.ModuleList) and len(model.router) == len(layers):
        return [gate.gate.weight.shape[0] if isinstance(gate, LayerGate) else model.num_experts for gate in model.router]
    return [model.num_experts] * len(layers)
