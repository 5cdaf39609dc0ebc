"""Tiny specimens for the runtime's tests, written once a session; models are loaded anew for each test that changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.specimens import write_base, write_checkpoint
from tests.unit.runtime.stock import E


@pytest.fixture(scope="session")
def specimens(tmp_path_factory):
    """Family and features -> native checkpoint directory, made on first use."""
    root = tmp_path_factory.mktemp("specimens")
    made: dict[tuple, Path] = {}

    def specimen(family: str = "llama", features: str = "base", **options) -> Path:
        key = (family, features, *sorted(options.items()))
        if key not in made:
            base = root / family
            if not base.exists():
                write_base(base, family)
            options = {"num_experts": E, "targets": "all-linear", **options}
            made[key] = write_checkpoint(root / f"checkpoint-{len(made)}", base, features=features, **options)
        return made[key]

    return specimen


@pytest.fixture
def ids():
    return torch.randint(5, 300, (3, 9))
