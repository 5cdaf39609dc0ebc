"""One thread, no network, a seed per test; the longest files first."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Last, so that dylo_moe and harness come from the installed wheel and only fixtures and tests from the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import pytest
import torch

# Files of more than ten seconds, longest first: with `--dist loadfile --no-loadscope-reorder` the last file that a process
# takes is then a short one, and no process waits for the other.
LONGEST = (
    "meta/test_faults.py",
    "end_to_end/test_planted_competence.py",
    "meta/test_decoder_faults.py",
    "end_to_end/test_ray_cluster.py",
    "test_docs.py",
    "unit/runtime/test_model.py",
    "meta/test_router_faults.py",
    "unit/test_evalplus.py",
    "unit/test_artifact.py",
    "unit/fixtures/test_bad.py",
    "unit/fixtures/test_layouts.py",
    "test_findings.py",
    "end_to_end/test_killed_runs.py",
    "meta/test_waste.py",
    "meta/test_cli.py",
    "end_to_end/test_expert_analysis.py",
    "unit/test_convert.py",
    "unit/test_decoder.py",
    "end_to_end/test_benchmark.py",
    "meta/test_beyond.py",
    "end_to_end/test_real_humaneval.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))  # stable: the tests of a file stay in their order


def pytest_collection_finish() -> None:
    """What is imported by now stays. Frozen, it is not walked by every full garbage collection: a tenth of the whole suite."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def file_size_limit():
    """`with file_size_limit(size)`: no file grows beyond so many bytes, as on a full disk: some are written, then none."""
    return _file_size_limit


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
