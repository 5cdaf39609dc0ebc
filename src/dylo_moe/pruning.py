"""Fewer experts: theirs and the router's rows are taken out, the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dylo_moe.errors import ConversionError, OptionError
from dylo_moe.formats import Checkpoint, GatesState, GateState, Router, RouterState, XLoraState

# Their thresholds are compared with probabilities among all experts: with fewer experts they would mean something else.
_RULES_OF_ALL_EXPERTS = ("top_p", "threshold", "adaptive_threshold")


def prune(checkpoint: Checkpoint, kept: Sequence[int]) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with the experts `kept` only, and a line for everything else that had to change.

    What the router computes is what it computed had the logits of the others been minus infinity. Nothing is copied.

    Args:
        kept: indices in ascending order, so that each router's columns keep their order.

    Raises:
        OptionError: indices that are out of range, repeated, or not in order.
        ConversionError: a router whose rule would mean something else, or a layer that would be left without an expert.
    """
    _check(kept, checkpoint.num_experts)
    experts = tuple(checkpoint.experts[index] for index in kept)
    router, notes = _prune_router(checkpoint, kept)
    return replace(checkpoint, experts=experts, router=router), notes


def _check(kept: Sequence[int], count: int) -> None:
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        listed = ",".join(str(index) for index in kept)
        raise OptionError(f"experts={listed}, but should be some of the numbers 0 to {count - 1}, each once, in ascending order")


def _prune_router(checkpoint: Checkpoint, kept: Sequence[int]) -> tuple[Router | None, tuple[str, ...]]:
    router = checkpoint.router
    if isinstance(router, RouterState):
        rows, top_k = list(kept), min(router.top_k, len(kept))
        notes = _top_k_note(router.top_k, top_k)
        return replace(router, weight=router.weight[rows], bias=router.bias[rows], top_k=top_k), notes
    if isinstance(router, XLoraState):
        return _prune_classifier(router, kept)
    if isinstance(router, GatesState):
        return _prune_gates(checkpoint, router, kept)
    return None, ()


def _top_k_note(before: int | None, after: int | None) -> tuple[str, ...]:
    return () if before == after else (f"top_k was {before} and is {after}: there are no more experts",)


def _prune_classifier(router: XLoraState, kept: Sequence[int]) -> tuple[XLoraState, tuple[str, ...]]:
    # With scalings per layer, the last Linear's outputs are (layers, experts).
    layers = range(router.num_layers if router.layerwise else 1)
    rows = [layer * router.num_experts + index for layer in layers for index in kept]
    weight, bias = router.layers[-1]
    last = (weight[rows], None if bias is None else bias[rows])
    top_k = None if router.top_k is None else min(router.top_k, len(kept))
    changed = replace(router, layers=(*router.layers[:-1], last), num_experts=len(kept), top_k=top_k)
    return changed, _top_k_note(router.top_k, top_k)


def _prune_gates(checkpoint: Checkpoint, router: GatesState, kept: Sequence[int]) -> tuple[GatesState, tuple[str, ...]]:
    if router.rule in _RULES_OF_ALL_EXPERTS and len(kept) < router.num_experts:
        reason = f"the threshold of its rule {router.rule} holds among all {router.num_experts} experts"
        raise ConversionError(f"{checkpoint.path}: its experts cannot be pruned: {reason}")
    gates, clipped = {}, set()
    for unit, gate in router.gates.items():
        rows = [index for index in kept if index < gate.weight.shape[0]]
        if not rows:
            raise ConversionError(f"{checkpoint.path}: its experts cannot be pruned so: {unit} would have none")
        gates[unit] = _prune_gate(gate, rows)
        clipped |= set(_top_k_note(gate.top_k, gates[unit].top_k))
    return replace(router, gates=gates, num_experts=len(kept)), tuple(sorted(clipped))


def _prune_gate(gate: GateState, rows: list[int]) -> GateState:
    bias: Tensor | None = None if gate.bias is None else gate.bias[rows]
    top_k = None if gate.top_k is None else min(gate.top_k, len(rows))
    return replace(gate, weight=gate.weight[rows], bias=bias, top_k=top_k)
