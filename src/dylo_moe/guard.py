"""PEFT's methods that would break a routed model: refused as a whole, before they change anything."""

from __future__ import annotations

from typing import NoReturn

from peft import PeftModel

from dylo_moe.errors import RoutingError

# Method of PEFT's tuner -> what users call. A layer cannot refuse for all: the tuner has changed other layers and its list of
# adapters before it asks.
_REFUSED = {
    "merge_adapter": "merge_adapter",
    "merge_and_unload": "merge_and_unload",
    "unload": "unload",
    "delete_adapter": "delete_adapter",
    "inject_adapter": "add_adapter",
    "add_weighted_adapter": "add_weighted_adapter",
}


class Refusal:
    """Stands in the place of a method."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RoutingError(f"{self.name} would break the routing of this model; call detach_router first")


def guard(peft_model: PeftModel) -> None:
    """Refuses them on this model alone; PEFT's classes stay as they are."""
    for method, name in _REFUSED.items():
        setattr(peft_model.base_model, method, Refusal(name))


def unguard(peft_model: PeftModel) -> None:
    for method in _REFUSED:
        vars(peft_model.base_model).pop(method, None)
