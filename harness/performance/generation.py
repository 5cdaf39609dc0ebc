"""Cells of generation: beside the base model, PEFT's X-LoRA, and experts one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from harness.performance.cells import Cell
from harness.performance.shapes import Models, Shape, write_models, write_xlora_models
from harness.subjects import find_subject

PROMPT = 128
NEW_TOKENS = 128
ONE_PASS_GOAL = 1.06
TWO_PASS_GOAL = 1.5
TWO_PASS_BOUND = 2.0  # where every guess is wrong
WEAK, STRONG = 0.05, 16.0  # experts with which nearly every guess is right, and hardly any
XLORA_GOAL = 15.0
XLORA_SHAPES = (
    Shape(512, features="base"),
    Shape(1024, features="base"),
    Shape(1024, experts=8, features="base"),
)
AT_ONCE_GOALS = {4: 0.5, 8: 0.4}


def one_pass(quick: bool) -> Iterator[Cell]:
    """generate in one pass / generate of the base model."""
    for targets, experts in (("attention", 4),) if quick else (("attention", 4), ("attention", 8), ("all-linear", 4)):
        shape = Shape(512 if quick else 1024, targets, experts)
        yield from _beside_base("generate, one pass", shape, ONE_PASS_GOAL, quick)


def two_passes(quick: bool) -> Iterator[Cell]:
    """generate with features `base` / generate of the base model: with experts that change few tokens, and nearly all."""
    for dtype in ("float32",) if quick else ("bfloat16", "float32"):
        shape = Shape(512 if quick else 1024, features="base", dtype=dtype)
        yield from _beside_base("generate, features base", replace(shape, strength=WEAK), TWO_PASS_GOAL, quick)
        strong = replace(shape, strength=STRONG)
        yield from _beside_base("generate, features base, wrong guesses", strong, TWO_PASS_BOUND, quick)


def _beside_base(group: str, shape: Shape, factor: float, quick: bool) -> Iterator[Cell]:
    with TemporaryDirectory() as directory:
        models, tokens = write_models(Path(directory), shape), NEW_TOKENS // 4 if quick else NEW_TOKENS
        limit = models.byte_limit()
        generate(models.routed, models, tokens)
        guesses = models.routed.last_guesses
        yield Cell(
            group,
            f"{shape.label} {PROMPT}+{tokens}",
            factor * limit,
            limit,
            ours=lambda: generate(models.routed, models, tokens),
            other=lambda: generate(models.base, models, tokens),
            tags=shape.tags,
            note="" if guesses is None else f"{guesses[1]} of {guesses[0]} guesses right",
        )


def generate(model: nn.Module, models: Models, tokens: int, **options: object) -> torch.Tensor:
    """Greedy, of one prompt; options: more of transformers' generate."""
    ids = models.ids(PROMPT)
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)


def xlora(quick: bool) -> Iterator[Cell]:
    """generate of PEFT's X-LoRA / ours with the same weights. PEFT keeps no cache, so it grows with the length."""
    for shape in [Shape(256, features="base")] if quick else XLORA_SHAPES:
        yield from beside_peft(shape, XLORA_GOAL, quick)


def beside_peft(shape: Shape, goal: float, quick: bool) -> Iterator[Cell]:
    with TemporaryDirectory() as directory:
        models, tokens = write_xlora_models(Path(directory), shape), NEW_TOKENS // 4 if quick else NEW_TOKENS
        peft = find_subject("peft-xlora").load(models.checkpoint).to(shape.device)
        yield Cell(
            "PEFT X-LoRA generate / ours",
            f"{shape.label} {PROMPT}+{tokens}",
            goal,
            at_least=True,
            ours=lambda: generate(peft, models, tokens),
            other=lambda: generate(models.routed, models, tokens),
            tags=shape.tags,
        )


def at_once(quick: bool) -> Iterator[Cell]:
    """The strategy `ensemble`, every expert a row of one batch / one generate for each expert."""
    for experts, goal in AT_ONCE_GOALS.items():
        if not quick or experts == 4:
            yield from _at_once(Shape(512 if quick else 1024, experts=experts), goal, 16 if quick else 64)


def _at_once(shape: Shape, goal: float, tokens: int) -> Iterator[Cell]:
    with TemporaryDirectory() as directory:
        models = write_models(Path(directory), shape)

        def one_by_one() -> None:
            for expert in range(shape.experts):
                generate(models.routed, models, tokens, strategy=f"single:{expert}")

        yield Cell(
            "experts at once / one by one",
            f"{shape.label} {PROMPT}+{tokens}",
            goal,
            1 / shape.experts,
            ours=lambda: generate(models.routed, models, tokens, strategy="ensemble"),
            other=one_by_one,
            tags=shape.tags,
        )
