"""Tiny checkpoints with every kind of router, built in memory: hidden size 8, two experts."""

from __future__ import annotations

from dataclasses import fields

import torch

from dylo_moe.formats import Checkpoint, Expert, GatesState, GateState, LoraPair, RouterState, XLoraState
from tests.unit.formats import written

MLPS = tuple(f"model.layers.{layer}.mlp" for layer in range(2))


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def expert(name, modules=written.MODULES, rank=4):
    return Expert(name, {module: LoraPair(draw(rank, 8), draw(8, rank), 8.0) for module in modules})


def classifier(*, experts=2, layerwise=False, bias=True, dtype=torch.float32, **settings):
    outputs = experts * (len(written.MODULES) if layerwise else 1)
    layers = [(draw(o, i, dtype=dtype), draw(o, dtype=dtype) if bias else None) for o, i in ((6, 8), (6, 6), (outputs, 6))]
    return XLoraState(tuple(layers), experts, len(written.MODULES), layerwise=layerwise, **settings)


def gates(rule="softmax", *, bias=False, units=written.MODULES, level="linear", rows=2):
    top_k = 1 if "topk" in rule or rule == "arrow" else None
    adaptive = rule == "adaptive_threshold"

    def gate():
        threshold = (draw(1, 8), draw(1)) if adaptive else (None, None)
        return GateState(draw(rows, 8), draw(rows) if bias else None, top_k, *threshold)

    threshold = 0.4 if rule in ("top_p", "threshold", "adaptive_threshold") else None
    switch = {"mixlora_switch": "training", "expert_capacity": 4} if rule == "switch" else {}
    return GatesState({unit: gate() for unit in units}, rule, 2, level, 0.5, threshold, **switch)


def mixture(router, **changes):
    experts = (expert("code"), expert("maths"))
    return Checkpoint(
        **{"path": None, "format": "dylo-moe", "base_model": "base", "experts": experts, "router": router, **changes}
    )


def hybrid(features="base", top_k=1):
    return RouterState(draw(2, 8), draw(2), features, top_k, 0.7)


def same(ours, theirs):
    """Equal in every field, tensors bitwise and of one dtype."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if type(ours) in (RouterState, XLoraState, GatesState, GateState, LoraPair):
        return type(ours) is type(theirs) and all(same(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))
    return ours == theirs
