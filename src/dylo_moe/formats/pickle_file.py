"""`.pt` and `.bin` files: a child process with limits turns them into safetensors, and only those are read here.

torch.load(weights_only=True) runs no code, but a pickle of 1 kB can still ask for gigabytes, so the child's memory, output and
time are limited by the size of the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import UnreadableFile
from dylo_moe.formats.pickle_reader import READER
from dylo_moe.formats.safetensors_file import load_tensors

# Nested dict with str keys; leaves are tensors, numbers, text, None or lists of those.
PickleTree = dict[str, Any]

# Reading takes seconds per gigabyte; importing torch some seconds on a busy machine.
BASE_SECONDS = 120.0
SECONDS_PER_BYTE = 30e-9


def convert_pickles(paths: Mapping[Path, Path]) -> dict[Path, tuple[PickleTree, str]]:
    """Tree and SHA-256 of each file. `paths` maps the name for messages to the real path.

    Raises:
        UnreadableFile: not a pickle of tensors and plain values, needs code, too much memory or time.
    """
    seconds = BASE_SECONDS + SECONDS_PER_BYTE * sum(real.stat().st_size for real in paths.values())
    with tempfile.TemporaryDirectory(prefix="dylo-moe-") as scratch:
        run_child(list(paths.values()), Path(scratch), seconds)
        return {name: _collect(Path(scratch) / str(number), name) for number, name in enumerate(paths)}


def run_child(files: list[Path], scratch: Path, seconds: float) -> None:
    """Have the reader read the files; what it finds is in `scratch`. UnreadableFile when it takes too long."""
    try:
        READER.read(files, scratch, seconds)
    except TimeoutError as error:
        found = f"a file that takes more than {seconds:.0f} s to read"
        raise UnreadableFile(files[0], "", found=found, expected="a PyTorch file of tensors") from error


def _collect(prefix: Path, name: Path) -> tuple[PickleTree, str]:
    report = prefix.with_suffix(".json")
    expected = "a PyTorch file that holds only tensors and plain values, readable without running code"
    if not report.exists():
        raise UnreadableFile(name, "", found="a file that the reader did not survive", expected=expected)
    answer = json.loads(report.read_text())
    if "refused" in answer:
        raise UnreadableFile(name, "", found=answer["refused"], expected=expected)
    tensors, _ = load_tensors(prefix.with_suffix(".safetensors"), name)
    return _plant(answer["tree"], tensors), answer["sha256"]


def _plant(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, value = node
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _plant(child, tensors) for key, child in value.items()}
    if kind == "list":
        return [_plant(child, tensors) for child in value]
    return value
