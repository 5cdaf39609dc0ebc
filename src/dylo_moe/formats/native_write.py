"""The native format, writing: everything goes into a private directory beside the target, then one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import InvalidField
from dylo_moe.formats.adapter import check_expert_name
from dylo_moe.formats.adapter_write import default_pair, save_tensors, write_expert, write_json
from dylo_moe.formats.checkpoint import Checkpoint, Expert, GatesState, Router, RouterState, XLoraState
from dylo_moe.formats.native import CONFIG, EXPERTS, HYBRID, MARK, ROUTER, SHARED, VERSION
from dylo_moe.formats.router_fit import check_router_fits
from dylo_moe.formats.router_sections import gates_section, router_tensors, xlora_section
from dylo_moe.formats.scratch import scratch_beside
from dylo_moe.formats.tokenizer_files import tokenizer_files


def write_native(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Write experts, router and settings of `checkpoint`; reading them back gives the same tensors, bit for bit.

    The tokenizer's files are copied where `checkpoint.tokenizer` names a directory. Files in `directory` that are not ours stay.

    Raises:
        InvalidField: no experts, an impossible expert name, or a directory with other contents than an earlier checkpoint.
        UnreadableFile: the directory cannot be written.
    """
    target = Path(directory)
    _check_experts(checkpoint, target)
    _check_target(target)
    with scratch_beside(target) as scratch:
        _write_files(scratch, checkpoint)
        _swap(scratch, target)
    return target


def _check_experts(checkpoint: Checkpoint, target: Path) -> None:
    if not checkpoint.experts:
        raise InvalidField(target, "experts", found="no experts", expected="at least one")
    shared = () if checkpoint.shared is None else (checkpoint.shared,)
    names = [expert.name for expert in (*checkpoint.experts, *shared)]
    for name in names:
        check_expert_name(name, target)
        if names.count(name) > 1:
            raise InvalidField(target, "experts", found=f"{name!r} twice", expected="each name once")
    check_router_fits(checkpoint.router, checkpoint.experts, target)


def _check_target(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise InvalidField(target, "", found="something that is not a directory", expected="a new directory")
    if any(target.iterdir()) and not (target / CONFIG).is_file():
        expected = "a new or empty directory, or an earlier checkpoint of this format"
        raise InvalidField(target, "", found=f"a directory with contents but without {CONFIG}", expected=expected)


def _write_files(directory: Path, checkpoint: Checkpoint) -> None:
    for expert in checkpoint.experts:
        write_expert(directory / EXPERTS / expert.name, expert, checkpoint.base_model)
    if checkpoint.shared is not None:
        write_expert(directory / SHARED, checkpoint.shared, checkpoint.base_model)
    if checkpoint.router is not None:
        save_tensors(directory / ROUTER, _router_tensors(checkpoint.router))
    if checkpoint.tokenizer is not None:
        for path in tokenizer_files(checkpoint.tokenizer):
            shutil.copyfile(path, directory / path.name)
    write_json(directory / CONFIG, _moe_config(checkpoint))


def _moe_config(checkpoint: Checkpoint) -> dict[str, Any]:
    shared = {} if checkpoint.shared is None else {"shared": _entry(checkpoint.shared)}
    return {
        "format": MARK,
        "format_version": VERSION,
        "base_model_name_or_path": checkpoint.base_model,
        "num_experts": checkpoint.num_experts,
        "experts": [_entry(expert) for expert in checkpoint.experts],
        **shared,
        "router": None if checkpoint.router is None else _router_section(checkpoint.router),
        "load_balance": dict(checkpoint.load_balance),
    }


def _entry(expert: Expert) -> dict[str, Any]:
    return {"name": expert.name, "scaling": default_pair(expert).scaling}


def _router_section(router: Router) -> dict[str, Any]:
    if isinstance(router, XLoraState):
        return xlora_section(router)
    if isinstance(router, GatesState):
        return gates_section(router)
    settings = {name: getattr(router, name) for name in ("features", "hidden_size", "top_k", "temperature")}
    return {"type": HYBRID, **settings}


def _router_tensors(router: Router) -> dict[str, Tensor]:
    if isinstance(router, RouterState):
        return {"gate.weight": router.weight, "gate.bias": router.bias}
    return router_tensors(router)


def _swap(scratch: Path, target: Path) -> None:
    """Put `scratch` in the place of `target`; what else lies in an earlier checkpoint moves along."""
    if not target.exists():
        os.rename(scratch, target)
        return
    if not any(target.iterdir()):
        os.rename(scratch, target)  # rename replaces an empty directory
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "checkpoint")
    os.rename(scratch, target)
    ours = {CONFIG, ROUTER, EXPERTS, SHARED}
    for entry in sorted((old / "checkpoint").iterdir()):
        if entry.name not in ours and not (target / entry.name).exists():
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)
