"""What a caller says about a checkpoint that its files may leave open."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """None leaves a value to the files, then, for the router's three, to the recorded assumption."""

    lora_alpha: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    router_features: str | None = None
