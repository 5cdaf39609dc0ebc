"""Disk -> Checkpoint: every layout of a LoRA mixture of experts, detected, read and validated. Nothing else opens checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dylo_moe.errors import HashMismatch, OptionError, UnknownFormat
from dylo_moe.formats import (
    adamole,
    dylora,
    loramoe,
    mergoo,
    moe_peft,
    mola,
    native,
    peft_arrow,
    peft_lora,
    peft_poly,
    peft_xlora,
    xlora,
)
from dylo_moe.formats.adapter import check_same_sizes
from dylo_moe.formats.base import check_experts_fit_base, resolve_base
from dylo_moe.formats.checkpoint import (
    GATE_RULES,
    MIXLORA_SWITCH,
    ROUTER_FEATURES,
    Checkpoint,
    Expert,
    GatesState,
    GateState,
    LoraPair,
    Router,
    RouterState,
    XLoraState,
)
from dylo_moe.formats.detect import BUNDLE, BUNDLE_FILE, FORMATS, FULL_STATE, detect
from dylo_moe.formats.dylora_bundle import read_bundle
from dylo_moe.formats.dylora_full import read_full_state
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.merged import read_merged
from dylo_moe.formats.native_write import write_native
from dylo_moe.formats.options import Adapters, ReadOptions
from dylo_moe.formats.switch import check_is_switch, check_stated

__all__ = [
    "Adapters",
    "FORMATS",
    "GATE_RULES",
    "MIXLORA_SWITCH",
    "ROUTER_FEATURES",
    "Checkpoint",
    "Expert",
    "GateState",
    "GatesState",
    "LoraPair",
    "Router",
    "RouterState",
    "XLoraState",
    "check_experts_fit_base",
    "combined_hash",
    "detect_model_format",
    "read_checkpoint",
    "resolve_base",
    "write_native",
]


def detect_model_format(path: str | Path) -> str:
    """The format of a checkpoint: one of FORMATS. Opens JSON and safetensors headers only.

    Raises:
        UnknownFormat: no rule fits, or two do; the message lists what was found and what is known.
        MissingFile: nothing there. UnreadableFile, InvalidField: a file that decides is damaged.
    """
    path = Path(path)
    return detect(CheckpointFiles(_root(path)), path)


def read_checkpoint(  # noqa: PLR0913 - as load_checkpoint: one option per thing that files may not hold
    path: str | Path,
    *,
    lora_alpha: float | None = None,
    top_k: int | tuple[int, ...] | None = None,
    temperature: float | None = None,
    router_features: str | None = None,
    rng_seed: int | None = None,
    genknowsub: str | None = None,
    softmax_topk: str | None = None,
    mixlora_switch: str | None = None,
    adapters: Adapters = None,
    expect_hash: str | Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read and validate a checkpoint of any format.

    Args:
        path: a directory, or a single .pt file of DyLoRA-MoE.
        lora_alpha: for layouts that record no alpha.
        top_k, temperature, router_features: take the place of what the files record or leave open; a tuple for top_k gives one
            for each layer of the base model, which only MoLA has.
        rng_seed: of Arrow's prototypes, where its files record none.
        genknowsub: "subtract" or "subtracted": whether Arrow's experts still hold the general adapters, where it cannot be told.
        softmax_topk: "token" or "batch": what X-LoRA's enable_softmax_topk takes its softmax over; None for what the package that
            wrote the files does: the standalone one over the batch, PEFT over the token since its 0.18.
        mixlora_switch: "training" or "inference": what an MLP of MoE-PEFT's mixlora-switch gives; see docs/formats.md.
        adapters: directories of X-LoRA's experts outside of the checkpoint, by name or one that holds them all. The paths that
            the checkpoint records are not opened unless they are named here.
        expect_hash: SHA-256 by relative file name, or the `combined_hash` of all files read.

    Raises:
        CheckpointError: one of its subclasses, naming file and field, what was found and what was expected.
    """
    path = Path(path)
    _check_options(expect_hash, adapters)
    pinned = expect_hash if isinstance(expect_hash, Mapping) else None
    files = CheckpointFiles(_root(path), pinned)
    options = ReadOptions(
        lora_alpha, top_k, temperature, router_features, rng_seed, genknowsub, softmax_topk, mixlora_switch, adapters
    )
    check_stated(options, path)
    checkpoint = _read(files, detect(files, path), path, options)
    check_is_switch(checkpoint.router, options, path)
    check_same_sizes(checkpoint.experts, path)
    files.check_all_expected_read()
    if isinstance(expect_hash, str) and combined_hash(files.hashes) != expect_hash.lower():
        raise HashMismatch(path, "combined sha256", found=combined_hash(files.hashes), expected=expect_hash)
    return replace(
        checkpoint,
        path=path,
        hashes=dict(files.hashes),
        warnings=tuple(files.warnings),
        assumptions=dict(files.assumptions),
    )


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a checkpoint: of the lines "<sha256>  <relative name>", sorted by name, as sha256sum prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_options(expect_hash: object, adapters: object) -> None:
    """Raises OptionError for options of another type: a hash that is none must not pass for one that was compared."""
    for name, value, kinds in (("expect_hash", expect_hash, str), ("adapters", adapters, str | Path)):
        values = value.values() if isinstance(value, Mapping) else () if value is None else (value,)
        for each in values:
            if not isinstance(each, kinds):
                raise OptionError(f"{name} holds {each!r:.80}, but should hold text")


def _root(path: Path) -> Path:
    return path.parent if os.path.isfile(path) else path


def _read(files: CheckpointFiles, name: str, path: Path, options: ReadOptions) -> Checkpoint:
    readers = {
        native.FORMAT: native.read_native,
        dylora.FORMAT: dylora.read_separated,
        FULL_STATE: read_full_state,
        peft_lora.LORA_FORMAT: peft_lora.read_lora,
        peft_lora.BAG_FORMAT: peft_lora.read_bag,
        peft_lora.ADALORA_FORMAT: peft_lora.read_adalora_alone,
        peft_arrow.FORMAT: peft_arrow.read_arrow,
        peft_poly.FORMAT: peft_poly.read_poly,
        "mixlora": moe_peft.read_mixlora,
        "moe-peft-loramoe": moe_peft.read_moe_peft_loramoe,
        "moe-peft-mola": moe_peft.read_moe_peft_mola,
        mergoo.FORMAT: mergoo.read_mergoo,
        loramoe.LORAMOE: loramoe.read_loramoe,
        loramoe.HYDRALORA: loramoe.read_hydralora,
        mola.FORMAT: mola.read_mola,
        adamole.FORMAT: adamole.read_adamole,
        peft_xlora.FORMAT: peft_xlora.read_peft_xlora,
        xlora.FORMAT: xlora.read_xlora,
        "merged": read_merged,
    }
    if name == BUNDLE:
        return read_bundle(files, options, path if os.path.isfile(path) else path / BUNDLE_FILE)
    if name == FULL_STATE and os.path.isfile(path):
        return read_full_state(files, options, path)
    if name not in readers:
        raise UnknownFormat(path, "", found=f"{name}, which is recognised but not read", expected=f"one of {', '.join(readers)}")
    return readers[name](files, options)
