"""convert_checkpoint: a checkpoint of any format that can be read -> our own, PEFT's X-LoRA, a bag of LoRAs, or one LoRA.

What is written is read back and compared, tensor by tensor, before it gets its name: a conversion either computes what the
original computes or does not exist. The original is only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dylo_moe.errors import ConversionError, InvalidField, OptionError
from dylo_moe.expressing import expressed, refusal
from dylo_moe.formats import (
    Checkpoint,
    Expert,
    LoraPair,
    check_experts_fit_base,
    detect_model_format,
    read_checkpoint,
    resolve_base,
    write_native,
)
from dylo_moe.formats.bag_write import write_bag, write_lora
from dylo_moe.formats.base import read_base
from dylo_moe.formats.base_write import write_base
from dylo_moe.formats.peft_xlora_write import write_xlora
from dylo_moe.formats.scratch import scratch_beside
from dylo_moe.merging import merge as merged
from dylo_moe.pruning import prune

BASE = "base"
TARGETS = {"dylora": "dylo-moe", "dylo-moe": "dylo-moe", "xlora": "peft-xlora", "bag": "lora-bag", "peft-lora": "peft-lora"}


@dataclass(frozen=True)
class Conversion:
    """path: the new directory. format: what it is detected as. notes: what else changed, one line each."""

    path: Path
    format: str
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    to: str,
    experts: Sequence[int] | None = None,
    merge: Sequence[float] | None = None,
    drop_router: bool = False,
    base_model: str | None = None,
) -> Conversion:
    """Write a checkpoint in another format; the tensors stay what they are, bit for bit, and pickles become safetensors.

    Base weights that the checkpoint holds itself (full-state layouts, mergoo) go to `target`/base, a plain transformers model.

    Args:
        source: a checkpoint, or its path; for options of read_checkpoint, read it with them first.
        target: a directory that does not exist or is empty; it appears complete or not at all.
        to: "dylora" (our own format, also "dylo-moe"), "xlora" (PEFT's X-LoRA), "bag" (one plain PEFT LoRA per subdirectory) or
            "peft-lora" (one alone).
        experts: keep these only, see pruning.prune.
        merge: one adapter for fixed weights, see merging.merge; for "bag" and "peft-lora".
        drop_router: allow a target that has no place for the router.
        base_model: to record instead of what the checkpoint records; of a full state without its own config.json, whose
            config.json to take.

    Raises:
        OptionError: an unknown target, or options that do not fit together.
        ConversionError: the target cannot express the checkpoint; the message says why.
        CheckpointError: the source cannot be read, or the target not written.
    """
    if to not in TARGETS:
        raise OptionError(f"to={to!r}, but should be one of {', '.join(TARGETS)}")
    if merge is not None and to not in ("bag", "peft-lora"):
        raise OptionError(f"merge with to={to!r}: a merged adapter is no mixture; use to='peft-lora' or to='bag'")
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    target = Path(target)
    _check_place(checkpoint.path, target)
    notes = [f"assumed {name}={value}, which is recorded from now on" for name, value in checkpoint.assumptions.items()]
    if experts is not None:
        checkpoint, more = prune(checkpoint, experts)
        notes += more
    if merge is not None:
        checkpoint, drop_router = merged(checkpoint, merge), True
    checkpoint, more = expressed(checkpoint, to, drop_router=drop_router)
    notes += more
    _check_repeats(checkpoint)
    checkpoint, more = _with_base(checkpoint, base_model)
    _write(checkpoint, target, TARGETS[to])
    return Conversion(target, TARGETS[to], (*notes, *more))


def _check_repeats(checkpoint: Checkpoint) -> None:
    repeated = [f"{expert.name}: {name}" for expert in checkpoint.adapters for name in expert.repeated]
    if repeated:
        how = "load_checkpoint compares them with the base model, and save_pretrained writes the rest"
        raise ConversionError(f"{checkpoint.path}: base weights beside the experts' own ({', '.join(repeated[:3])}); {how}")


def _check_place(source: Path, target: Path) -> None:
    if target.resolve().is_relative_to(source.resolve()):
        raise OptionError(f"{target} lies inside the checkpoint {source}, which must stay as it is; name another directory")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} exists and is not an empty directory; name a new one")


def _with_base(checkpoint: Checkpoint, given: str | None) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with the base model that its copy records, wherever the copy will be."""
    if checkpoint.base_state is not None:
        return _with_own_base(checkpoint, given)
    if given is not None:
        place = resolve_base(None, given, checkpoint=checkpoint.path)
        if not os.path.isdir(place):
            return replace(checkpoint, base_model=place), ()
        return replace(checkpoint, base_model=os.path.abspath(place)), check_experts_fit_base(
            place, checkpoint.adapters, checkpoint.router
        )
    recorded = checkpoint.base_model
    place = None if recorded is None or os.path.isabs(recorded) else _relative_base(checkpoint, recorded)
    if place is None:
        return checkpoint, ()
    return replace(checkpoint, base_model=place), (f"the base model was recorded as {recorded}, and is now as {place}",)


def _relative_base(checkpoint: Checkpoint, recorded: str) -> str | None:
    """Where a recorded relative path leads today; None for a name of the hub."""
    for start in (checkpoint.path, Path(), checkpoint.path.parent):
        if os.path.isfile(start / recorded / "config.json"):
            return os.path.abspath(start / recorded)
    return None


def _with_own_base(checkpoint: Checkpoint, given: str | None) -> tuple[Checkpoint, tuple[str, ...]]:
    config = checkpoint.base_config
    if config is None or not config.get("model_type"):
        config = read_base(resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path)).config
    note = f"the base weights are in {BASE}/"
    return replace(checkpoint, base_model=BASE, base_config=config), (note,)


def _write(checkpoint: Checkpoint, target: Path, name: str) -> None:
    writers: dict[str, Callable[[Path, Checkpoint], object]] = {
        "dylo-moe": write_native,
        "lora-bag": write_bag,
        "peft-lora": write_lora,
        "peft-xlora": lambda directory, source: write_xlora(directory, source, target),
    }
    with scratch_beside(target) as scratch:
        try:
            writers[name](scratch, checkpoint)
        except InvalidField as error:
            raise refusal(checkpoint, name, f"{error.field}: found {error.found}, expected {error.expected}") from error
        if checkpoint.base_state is not None:
            if (scratch / BASE).exists():
                raise refusal(checkpoint, name, f"its expert {BASE!r} is in the place of its base weights")
            write_base(scratch / BASE, checkpoint.base_config, checkpoint.base_state)
        check_copy(checkpoint, scratch, name)
        os.rename(scratch, target)  # replaces an empty directory


def check_copy(checkpoint: Checkpoint, directory: Path, name: str) -> None:
    """Reads what was written and compares it: a defect of a writer or a reader must not become a checkpoint.

    Raises:
        ConversionError: another format, other experts or another router. CheckpointError: it cannot be read.
    """
    found = detect_model_format(directory)
    if found != name:
        raise refusal(checkpoint, name, f"it would be detected as {found}: the name of one of its experts is that format's mark")
    copy = read_checkpoint(directory)
    ours = {expert.name: expert for expert in checkpoint.adapters}
    theirs = {expert.name: expert for expert in copy.adapters}
    if name != "lora-bag":  # the others have an order instead of names
        ours, theirs = dict(enumerate(ours.values())), dict(enumerate(theirs.values()))
    if ours.keys() != theirs.keys() or not all(same_expert(ours[key], theirs[key]) for key in ours):
        raise ConversionError(f"{checkpoint.path}: its experts are not the same after writing and reading them")
    if name not in ("lora-bag", "peft-lora") and not _same(checkpoint.router, copy.router):
        raise ConversionError(f"{checkpoint.path}: its router is not the same after writing and reading it")


def same_expert(ours: Expert, theirs: Expert) -> bool:
    """Whether two experts hold the same tensors, bit for bit, with the same scaling on the same modules."""
    return all(_same(getattr(ours, part), getattr(theirs, part)) for part in ("modules", "replaced", "biases"))


def _same(ours: object, theirs: object) -> bool:
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, LoraPair) and isinstance(theirs, LoraPair) and ours.scaling != theirs.scaling:
        return False
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if hasattr(ours, "keys") and hasattr(theirs, "keys"):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours.keys())
    if hasattr(ours, "__dataclass_fields__") and type(ours) is type(theirs):
        return _same(vars(ours), vars(theirs))
    return ours == theirs
