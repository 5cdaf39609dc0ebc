"""One thread, no network, a seed per test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Last, so that dylo_moe and harness come from the installed wheel and only fixtures and tests from the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)
