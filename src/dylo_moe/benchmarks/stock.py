"""The backend hf: EvalPlus's own decoder through its run_codegen, in a directory that no other run shares.

EvalPlus names its file by model, backend and temperature only, and continues whatever it finds there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylo_moe.atomic import flush_to_disk
from dylo_moe.errors import DyloMoeError, OptionError, one_line
from dylo_moe.evalplus import run_codegen
from dylo_moe.identity import base_hash, identity_hash, versions
from dylo_moe.tasks import TaskSet

HF = "hf"
_NOT_IDENTITY = ("resume", "bs")


def generate_stock(model: str, task_set: TaskSet, decoding: Mapping[str, Any], directory: Path) -> Path:
    """The samples of a plain model, as EvalPlus generates them; returns the path of its sample file.

    Args:
        decoding: arguments of `run_codegen`, beside model and dataset.

    Raises:
        OptionError: options that EvalPlus's decoder does not have.
    """
    numbers = [int(task.split("/")[1]) for task in task_set.tasks]
    id_range = [min(numbers), max(numbers) + 1]
    for samples in stock_files(directory):
        _cut_torn_end(samples)
    try:
        identity = {**stock_identity(model, decoding), "task_file": task_set.hash}
        root = directory / f"{HF}-{identity_hash(identity)[:12]}"
        with contextlib.redirect_stdout(sys.stderr):  # EvalPlus tells how far it is, and stdout is for results
            return Path(run_codegen(model, task_set.dataset, root=str(root), backend=HF, id_range=id_range, **decoding))
    except DyloMoeError:
        raise
    except (ImportError, ValueError) as error:  # how transformers and the hub refuse what is no model
        raise OptionError(one_line(f"{model}: {error}")) from error


def stock_files(directory: Path) -> list[Path]:
    """The sample files that EvalPlus has written below a benchmark's directory."""
    return [path for path in directory.glob(f"{HF}-*/*/*.jsonl") if not path.name.endswith(".raw.jsonl")]


def stock_identity(model: str, decoding: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in decoding.items() if name not in _NOT_IDENTITY}
    return {"model": base_hash(model), "options": options, "versions": dict(versions())}


def _cut_torn_end(path: Path) -> None:
    """EvalPlus cannot continue a file whose last line a killed process left incomplete."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
            flush_to_disk(file.fileno())
