"""What a caller says about a checkpoint that its files may leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Directories of experts outside of the checkpoint: by the expert's name, or one directory that holds them all.
Adapters = Mapping[str, str | Path] | str | Path | None


@dataclass(frozen=True)
class ReadOptions:
    """None leaves a value to the files, then, for the router's three, to the recorded assumption.

    top_k: experts per token; a tuple gives one for each layer of the base model (MoLA).
    rng_seed: of Arrow's prototypes, where its files record none.
    adapters: X-LoRA's experts, where they are not in the checkpoint.
    genknowsub: "subtract" or "subtracted": whether Arrow's experts still hold the general adapters, where it cannot be told.
    """

    lora_alpha: float | None = None
    top_k: int | tuple[int, ...] | None = None
    temperature: float | None = None
    router_features: str | None = None
    rng_seed: int | None = None
    genknowsub: str | None = None
    adapters: Adapters = None
