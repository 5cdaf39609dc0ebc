"""Cells of the forward pass: dense and top-k weights beside the base pass, and passes per expert beside one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from harness.performance.cells import Cell
from harness.performance.shapes import Models, Shape, write_models
from harness.subjects import find_subject

DENSE_GOAL = 1.03
# E -> the factor over the work of the active experts.
TOP_K_GOALS = {8: 1.10, 32: 1.15, 128: 1.25}
MULTI_PASS_GOALS = {"embedding": {2: 2.8, 4: 4.6, 8: 8.0}, "base": {2: 1.45, 4: 2.4, 8: 4.2}}


def dense(quick: bool) -> Iterator[Cell]:
    """Single pass / base pass, dense weights."""
    shapes = [Shape(d, targets, e) for d in (512, 1024, 2048) for targets in ("attention", "all-linear") for e in (4, 8)]
    for shape in [Shape(512, "attention", 4), Shape(512, "all-linear", 8)] if quick else shapes:
        yield from _beside_base("dense", shape, (256,) if quick else (256, 1024), lambda limit: DENSE_GOAL * limit)


def top_k(quick: bool) -> Iterator[Cell]:
    """Single pass / base pass, top-1 and top-2 weights, against the work of the active experts."""
    for experts, factor in TOP_K_GOALS.items():
        for k in (1, 2):
            if not quick or (experts, k) == (32, 2):
                shape = Shape(512 if quick else 1024, experts=experts, top_k=k)
                yield from _beside_base("top-k", shape, (1024,), _times(factor))


def _times(factor: float) -> Callable[[float], float]:
    return lambda limit: factor * limit


def _beside_base(group: str, shape: Shape, lengths: tuple[int, ...], goal: Callable[[float], float]) -> Iterator[Cell]:
    with TemporaryDirectory() as directory:
        models = write_models(Path(directory), shape)
        for tokens in lengths:
            ids, limit = models.ids(tokens), models.work_limit(tokens)
            yield Cell(
                group,
                f"{shape.label} T={tokens}",
                goal(limit),
                limit,
                ours=lambda ids=ids: models.routed_pass(ids),
                other=lambda ids=ids: models.base_pass(ids),
                tags={**shape.tags, "tokens": tokens},
            )


def multi_pass(quick: bool) -> Iterator[Cell]:
    """One pass for each expert and one of the base / our forward, features `embedding` (one pass) and `base` (two)."""
    for features, goals in MULTI_PASS_GOALS.items():
        for experts, goal in goals.items():
            if not quick or experts == 4:
                shape = Shape(512 if quick else 1024, experts=experts, features=features)
                yield from _against_passes(shape, goal)


def _against_passes(shape: Shape, goal: float, tokens: int = 256) -> Iterator[Cell]:
    with TemporaryDirectory() as directory:
        models = write_models(Path(directory), shape)
        ids, limit = models.ids(tokens), models.work_limit(tokens)
        own = limit if shape.features == "embedding" else limit + _without_head(models, tokens)
        yield Cell(
            f"N+1 passes, features {shape.features}",
            f"{shape.label} T={tokens}",
            goal,
            (shape.experts + 1) / own,
            at_least=True,
            ours=lambda: _passes(models, ids),
            other=lambda: models.routed_pass(ids),
            tags={**shape.tags, "tokens": tokens},
        )


def _without_head(models: Models, tokens: int) -> float:
    head = 2 * tokens * models.base.get_output_embeddings().weight.numel()
    return 1 - head / models.base_flops(tokens)


def _passes(models: Models, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        for expert in range(models.shape.experts):
            models.routed(ids, expert_id=expert, use_cache=False)
    models.base_pass(ids)


def peers(quick: bool) -> Iterator[Cell]:
    """The published loop over experts / our pass: the same mixture, the same checkpoint."""
    for targets in ("attention",) if quick else ("attention", "all-linear"):
        shape = Shape(512 if quick else 1024, targets, experts=8)
        with TemporaryDirectory() as directory:
            models = write_models(Path(directory), shape)
            loop, ids = find_subject("naive-loop").load(models.checkpoint).eval(), models.ids(256)
            yield Cell(
                "loop over experts / ours",
                f"{shape.label} T=256",
                1.0,
                at_least=True,
                ours=lambda loop=loop, ids=ids: _run(loop, ids),
                other=lambda models=models, ids=ids: models.routed_pass(ids),
                tags={**shape.tags, "tokens": 256},
            )


def _run(model: torch.nn.Module, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model(ids)


def growth(quick: bool) -> Iterator[Cell]:
    """Single pass / base pass as E grows from 2 to 256 and as the sequence grows to 8192; no goal but the work limit's line."""
    for experts in (2, 8, 32) if quick else (2, 4, 8, 16, 32, 64, 128, 256):
        for k in (None, 1):
            yield from _beside_base("as E grows", Shape(512, experts=experts, top_k=k), (512,), _times(1.25))
    for tokens in (256, 1024) if quick else (256, 1024, 4096, 8192):
        shape = Shape(512, experts=8, longest=8192)
        yield from _beside_base("as the sequence grows", shape, (tokens,), _times(DENSE_GOAL))
