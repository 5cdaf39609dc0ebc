"""Cells of a GPU, at the shape of codegemma-2b in bfloat16: prefill, decoding with CUDA graphs on both sides, memory, X-LoRA.

On a CPU, where `quick` ones run too, transformers compiles no step, so these are the same passes without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from harness.measure import peak_bytes
from harness.performance.cells import Cell
from harness.performance.generation import NEW_TOKENS, PROMPT, beside_peft, generate
from harness.performance.shapes import CODEGEMMA, Models, Shape, write_models

PREFILL = 2048
PREFILL_GOALS = {"attention": 1.05, "all-linear": 1.12}
DECODE_GOALS = {"embedding": 1.10, "base": 1.25}
MEMORY_GOAL = 1.02
XLORA_GOAL = 30.0
EXPERTS = (2, 4, 8, 16)
GRAPHS = {"cache_implementation": "static"}  # transformers then compiles each step, with CUDA graphs
WARM_UPS = 3  # compile, record, replay


def prefill(quick: bool, device: str = "cuda") -> Iterator[Cell]:
    """Routed pass / base pass of one long prompt, dense weights; and the bytes of both beside the adapters' own."""
    with TemporaryDirectory() as directory:
        for targets, goal in PREFILL_GOALS.items():
            for experts in EXPERTS[1:2] if quick else EXPERTS:
                models = write_models(Path(directory), _shape(quick, device, targets, experts))
                yield from _prefill_cells(models, 64 if quick else PREFILL, goal)


def _prefill_cells(models: Models, tokens: int, goal: float) -> Iterator[Cell]:
    ids, tags = models.ids(tokens), {**models.shape.tags, "tokens": tokens}
    name = f"{models.shape.label} T={tokens}"
    ours, other = lambda: models.routed_pass(ids), lambda: models.base_pass(ids)
    yield Cell("prefill / base's", name, goal, models.work_limit(tokens), ours=ours, other=other, tags=tags)

    def ratio() -> float:
        adapters = sum(p.numel() * p.itemsize for name, p in models.routed.named_parameters() if "lora_" in name)
        routed = _bytes(models.routed, ours, models.shape.device) - adapters
        return routed / _bytes(models.base, other, models.shape.device)

    yield Cell("peak bytes without adapters / base's", name, MEMORY_GOAL, count=ratio, tags=tags)


def _bytes(model: nn.Module, work: Callable[[], None], device: str) -> int:
    """What the model holds, and the most that a pass adds."""
    return sum(p.numel() * p.itemsize for p in model.parameters()) + peak_bytes(work, device)


def decode(quick: bool, device: str = "cuda") -> Iterator[Cell]:
    """generate with CUDA graphs / the base model's; with the features `base` also with guesses, which have no graphs."""
    with TemporaryDirectory() as directory:
        for features, goal in DECODE_GOALS.items():
            for experts in EXPERTS[1:2] if quick else EXPERTS:
                models = write_models(Path(directory), _shape(quick, device, "attention", experts, features))
                yield _decode_cell(models, quick, goal, "graphs", GRAPHS)
                if features == "base":
                    yield _decode_cell(models, quick, goal, "guesses", {})


def _decode_cell(models: Models, quick: bool, goal: float, way: str, options: dict[str, str]) -> Cell:
    tokens = NEW_TOKENS // 8 if quick else NEW_TOKENS
    for _ in range(WARM_UPS):
        generate(models.routed, models, tokens, **options)
        generate(models.base, models, tokens, **GRAPHS)
    return Cell(
        f"generate, features {models.shape.features} / base's with graphs",
        f"{models.shape.label} {PROMPT}+{tokens}, {way}",
        goal,
        models.byte_limit(),
        ours=lambda: generate(models.routed, models, tokens, **options),
        other=lambda: generate(models.base, models, tokens, **GRAPHS),
        tags=models.shape.tags,
    )


def xlora(quick: bool, device: str = "cuda") -> Iterator[Cell]:
    """generate of PEFT's X-LoRA / ours with the same weights."""
    yield from beside_peft(_shape(quick, device, "attention", 4, "base"), XLORA_GOAL, quick)


def _shape(quick: bool, device: str, targets: str, experts: int, features: str = "embedding") -> Shape:
    hidden, bfloat16 = 256 if quick else CODEGEMMA["hidden_size"], {"dtype": "bfloat16", "autocast_adapter_dtype": False}
    return Shape(hidden, targets, experts, features=features, longest=4096, family="gemma", device=device, **bfloat16)
