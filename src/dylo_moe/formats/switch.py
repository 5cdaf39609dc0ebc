"""MoE-PEFT's mixlora-switch: training and inference compute two different things, and no file says which of them is meant."""

from __future__ import annotations

from pathlib import Path

from dylo_moe.errors import InvalidField
from dylo_moe.formats.checkpoint import MIXLORA_SWITCH, GatesState, Router
from dylo_moe.formats.files import CheckpointFiles
from dylo_moe.formats.options import ReadOptions

SWITCH = "switch"
MAX_CAPACITY = 1_000_000_000
_COMPUTED = {
    "training": "p FFN_e(x), and p x beyond the capacity of e, as the experts were trained",
    "inference": "each MLP hands its input on, as in MoE-PEFT's own generate and evaluate",
}
_NOTES = {
    "training": "mixlora-switch as in training: an expert runs for the first {capacity} tokens of a row that chose it, and an MLP"
    " hands the others on; what a token gets depends on those before it, and there is no KV cache",
    "inference": "mixlora-switch as in MoE-PEFT's inference: where the router decides, each MLP hands its input on, and no expert"
    " and no gate has any effect",
}


def stated_switch(options: ReadOptions, path: Path) -> str:
    """What the user says. Raises InvalidField for nothing, with both meanings."""
    if options.mixlora_switch is None:
        found = "nothing, beside the routing_strategy 'mixlora-switch'"
        expected = " or ".join(f"mixlora_switch={name} ({meaning})" for name, meaning in _COMPUTED.items())
        raise InvalidField(path, "mixlora_switch", found=found, expected=expected)
    return options.mixlora_switch


def check_stated(options: ReadOptions, path: Path) -> None:
    """Raises InvalidField unless the user says one of MIXLORA_SWITCH, or nothing."""
    if options.mixlora_switch not in (None, *MIXLORA_SWITCH):
        found = repr(options.mixlora_switch)[:80]
        raise InvalidField(path, "mixlora_switch", found=found, expected=f"one of {', '.join(MIXLORA_SWITCH)}")


def check_is_switch(router: Router | None, options: ReadOptions, path: Path) -> None:
    """Raises InvalidField where the user says it of another router, or of none."""
    if options.mixlora_switch is not None and getattr(router, "rule", None) != SWITCH:
        found = f"{options.mixlora_switch!r}, given by the caller"
        raise InvalidField(path, "mixlora_switch", found=found, expected="none: only MoE-PEFT's mixlora-switch has it")


def check_switch(router: GatesState, path: Path) -> None:
    """Raises InvalidField unless the rule "switch", and no other, has both its settings and mixes whole MLPs."""
    settings = {"mixlora_switch": router.mixlora_switch, "expert_capacity": router.expert_capacity}
    for name, value in settings.items():
        if (value is not None) != (router.rule == SWITCH):
            expected = f"{'a value' if value is None else 'null'} for rule {router.rule}"
            raise InvalidField(path, f"router.{name}", found=value, expected=expected)
    if router.rule == SWITCH and router.level != "feed_forward":
        raise InvalidField(path, "router.level", found=router.level, expected=f"feed_forward, for rule {SWITCH}")


def warn_of_switch(router: GatesState, files: CheckpointFiles) -> None:
    if router.mixlora_switch is not None:
        files.warn(_NOTES[router.mixlora_switch].format(capacity=router.expert_capacity))
