"""Stacks of experts that are kept while nobody can change a weight, that is, inside of one generate().

Outside, every pass reads the parameters themselves: a change through `.data`, NumPy or another tensor on that memory leaves no
trace that could be looked for, so a stack that outlived such a change would be wrong and silent. Inside, only code that is known
runs (`only_known_code`), and a change that leaves a trace is still looked for before each pass.
"""

from __future__ import annotations

import sys
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as EVERY
from torch.nn.modules.module import _global_forward_pre_hooks as EVERY_PRE

from dylo_moe.plain import Plain
from dylo_moe.sums import Sums

# Options of generate that bring code: lists of objects, objects, and what is not looked into.
_LISTS = ("logits_processor", "stopping_criteria")
_OBJECTS = ("past_key_values", "generation_config", "streamer")
_FOREIGN = ("prefix_allowed_tokens_fn", "assistant_model", "custom_generate", "negative_prompt_ids", "synced_gpus")
# Whose code changes no weight of a model that generates.
_KNOWN = ("dylo_moe", "transformers", "tokenizers", "torch", "peft", "accelerate")
_DATA = (*sys.stdlib_module_names, "numpy")  # whose objects call nothing by themselves
_VERSION = attrgetter("_version")
_WEIGHT = methodcaller("get", "weight")


class Held:
    """The stacks of one generation, made at first use."""

    def __init__(self) -> None:
        self.plain: dict[int, Plain] = {}  # by the id of a layer
        self._sums: dict[int, Sums] = {}
        self._owners: list[dict] = []  # where each stacked weight is found, and what it was then
        self._weights: list[Tensor] = []
        self._versions: list[int] = []
        self._places: list[int] = []

    def sums_of(self, layer: LoraLinear, make: Callable[[], Sums]) -> Sums:
        """The layer's, with a stack where one can be kept."""
        if id(layer) not in self._sums:
            sums = make()
            modules = [part[name] for part in (layer.lora_A, layer.lora_B) for name in part]
            if any(module.weight.is_inference() or "weight" not in module._parameters for module in modules):
                return sums  # nothing tells when such a weight is changed
            for module in modules:
                self._owners.append(module._parameters)
                self._weights.append(module.weight)
                self._versions.append(module.weight._version)
                self._places.append(module.weight.data_ptr())
            self._sums[id(layer)] = sums.stacked()
        return self._sums[id(layer)]

    def kept_sums(self, layer: LoraLinear) -> Sums | None:
        """The layer's, if it has a stack already."""
        return self._sums.get(id(layer))

    def check(self) -> bool:
        """Whether no weight was replaced, moved or written to since stacks were made of it; else they are forgotten."""
        is_same = all(map(is_, map(_WEIGHT, self._owners), self._weights))
        is_same = is_same and list(map(_VERSION, self._weights)) == self._versions
        is_same = is_same and list(map(Tensor.data_ptr, self._weights)) == self._places
        if not is_same:
            self.release()
        return is_same

    def release(self) -> None:
        """Forgets the stacks; their memory is free at once."""
        for plain in self.plain.values():
            plain.alone.dissolve()
            plain.together.dissolve()
        for kept in (self.plain, self._sums, self._owners, self._weights, self._versions, self._places):
            kept.clear()


def only_known_code(model: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a generation with these options runs no code of the user's between its passes: no callback, no hook, no module."""
    if any(options.get(name) is not None for name in _FOREIGN):
        return False
    given = list(chain.from_iterable(options.get(name) or () for name in _LISTS))
    given += [options[name] for name in _OBJECTS if options.get(name) is not None]
    modules = list(model.modules())
    types = {type(code) for code in chain(given, modules)}
    return all(map(_is_known, chain(types, _code_in(given), _hooks(modules))))


def _code_in(objects: Iterable[object]) -> Iterator[object]:
    """What a processor or a streamer of transformers was given to call: functions, and objects of somebody's class."""
    for holder in objects:
        for value in getattr(holder, "__dict__", {}).values():
            is_data = _package(type(value)) in _DATA or isinstance(value, AbstractEventLoop)
            if callable(value) or not is_data:
                yield value


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Callable]:
    """What runs in a pass beside the modules' own code: hooks of one or of all, and functions put in the place of a forward."""
    yield from (*EVERY.values(), *EVERY_PRE.values())
    for module in modules:
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "forward" in module.__dict__:
            yield module.__dict__["forward"]


def _is_known(code: object) -> bool:
    return _package(code) in _KNOWN


def _package(code: object) -> str:
    """Where a function or a class is from, or the class of anything else."""
    return (getattr(code, "__module__", None) or type(code).__module__).partition(".")[0]
