"""From a checkpoint's files to an Artifact: by the judge's own reading where it has one, else by the reader that it judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.artifact import Artifact
from harness.readings import arrow, bag, foreign, hydralora, mergoo, native, xlora
from harness.readings.layouts import NATIVE, layout_of

OWN_READING = "the judge's own reading of the files"
SUBJECTS_READER = "dylo_moe.read_checkpoint: this layout has no second reader, so its reading is not judged"

Reading = Callable[[Path, str | None, Mapping[str, Any]], Artifact]
_OWN: dict[str, Reading] = {
    NATIVE: native.read,
    "peft-xlora": xlora.read_peft,
    "xlora": xlora.read_standalone,
    "peft-arrow": arrow.read,
    "mergoo": mergoo.read,
    "hydralora": hydralora.read,
    "peft-lora": bag.read_one,
    "peft-adalora": bag.read_one,
    "lora-bag": bag.read_bag,
}


def read_artifact(path: Path, base_model: str | None = None, assume: Mapping[str, Any] | None = None) -> Artifact:
    """assume: what no file of a foreign layout records: lora_alpha, top_k, temperature, router_features, rng_seed.

    Raises whatever the file system, json or safetensors raise: the subject is asked first, and refuses by name.
    """
    path, assume = Path(path), dict(assume or {})
    layout = layout_of(path)
    own = _OWN.get(layout)
    if own is None or (layout == "peft-arrow" and not arrow.is_plain(path)) or not _is_told(layout, assume):
        return replace(foreign.read(path, base_model, assume), reader=SUBJECTS_READER)
    return replace(own(path, base_model, assume), reader=OWN_READING)


def _is_told(layout: str, assume: Mapping[str, Any]) -> bool:
    """Whether the judge's own reading knows what to do with everything that the user states."""
    understood = {"peft-arrow": {"rng_seed"}, "mergoo": {"top_k"}}
    return set(assume) <= understood.get(layout, set())
