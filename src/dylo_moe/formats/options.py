"""What a caller says about a checkpoint that its files may leave open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dylo_moe.errors import OptionError

# Directories of experts outside of the checkpoint: by the expert's name, or one directory that holds them all.
Adapters = Mapping[str, str | Path] | str | Path | None


@dataclass(frozen=True)
class ReadOptions:
    """None leaves a value to the files, then, for the router's three, to the recorded assumption.

    top_k: experts per token; a tuple gives one for each layer of the base model (MoLA).
    rng_seed: of Arrow's prototypes, where its files record none.
    adapters: X-LoRA's experts, where they are not in the checkpoint.
    softmax_topk: "token" or "batch": what X-LoRA's enable_softmax_topk takes its softmax over.
    mixlora_switch: "training" or "inference": which of the two things that MoE-PEFT computes is meant.
    genknowsub: "subtract" or "subtracted": whether Arrow's experts still hold the general adapters, where it cannot be told.
    """

    lora_alpha: float | None = None
    top_k: int | tuple[int, ...] | None = None
    temperature: float | None = None
    router_features: str | None = None
    rng_seed: int | None = None
    genknowsub: str | None = None
    softmax_topk: str | None = None
    mixlora_switch: str | None = None
    adapters: Adapters = None


def parse_assumptions(words: Sequence[str]) -> dict[str, Any]:
    """The words NAME=VALUE of a command line as options of `read_checkpoint`.

    A value that is JSON is read as such (2, 0.7, [2, 2, 1], {"code": "DIR"}), any other is text; a list becomes a tuple.

    Raises:
        OptionError: no such option, no value, or an option twice.
    """
    known = [field.name for field in fields(ReadOptions)]
    stated: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if name not in known or not equals or not text:
            raise OptionError(f"assume {word!r}, but should be NAME=VALUE with one of {', '.join(known)}")
        if name in stated:
            raise OptionError(f"assume {name} was given twice, but should be given once")
        stated[name] = _value(text)
    return stated


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value
