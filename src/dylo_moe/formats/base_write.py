"""Base weights that a checkpoint holds itself, written as a plain transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.formats.adapter_write import save_tensors, write_json


def write_base(directory: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors in a new directory; every tensor as it is, tied ones each with their own copy.

    Args:
        config: the base model's configuration. What names code, a place or an earlier format stays out of the copy.
        state: base weights by parameter name. The first one's dtype is recorded, as loading the checkpoint itself uses it.
    """
    directory.mkdir(parents=True)
    plain = {
        name: value for name, value in config.items() if not name.startswith("_") and name not in ("auto_map", "torch_dtype")
    }
    plain["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_tensors(directory / "model.safetensors", state)
    write_json(directory / "config.json", plain)
