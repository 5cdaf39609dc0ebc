"""Run LoRA mixture-of-experts checkpoints of every format in one pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dylo_moe.artifact import download_artifact
    from dylo_moe.config import MoELoraConfig
    from dylo_moe.decoder import PeftMoEDecoder
    from dylo_moe.expert import ExpertManager
    from dylo_moe.formats import Checkpoint, detect_model_format, read_checkpoint
    from dylo_moe.formats.options import parse_assumptions
    from dylo_moe.loading import load_checkpoint
    from dylo_moe.model import DyLoRA_MoE, attach_router, detach_router
    from dylo_moe.router import DynamicHybridRouter

_HOMES = {
    "Checkpoint": "formats",
    "DyLoRA_MoE": "model",
    "DynamicHybridRouter": "router",
    "ExpertManager": "expert",
    "MoELoraConfig": "config",
    "PeftMoEDecoder": "decoder",
    "attach_router": "model",
    "detach_router": "model",
    "detect_model_format": "formats",
    "download_artifact": "artifact",
    "load_checkpoint": "loading",
    "parse_assumptions": "formats.options",
    "read_checkpoint": "formats",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported on first use: torch, transformers and peft take seconds, and `dylo-moe --help` needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module 'dylo_moe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dylo_moe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
