"""The short way through layers that are their bases, which nobody watches, and sums of their experts: outside of a graph.

Layers that read one tensor (q, k and v of an attention) multiply it by all their A in one product and weigh that once: three
products with few columns each take longer than one with three times as many.

Shapes: B batch, S sequence, T = B * S tokens, R sum of the experts' ranks in a layer.
"""

from __future__ import annotations

from itertools import chain, count, repeat
from operator import attrgetter, contains, methodcaller

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.spread import Ahead, Signature, Spread
from dylo_moe.sums import Sums, add_dense, add_grouped

# Base layers whose output is nobody else's.
FRESH = (nn.Linear, Conv1D)

# Looked at in every pass, for each expert of each layer.
_WEIGHT, _SHAPE, _PARAMETERS = methodcaller("get", "weight"), attrgetter("shape"), attrgetter("_parameters")
MANY = 512  # columns: products of so many are as quick one by one
_MOST_KINDS = 4096


class Kinds:
    """A number for everything that a choice depends on: comparing that in each layer takes longer than a product."""

    def __init__(self) -> None:
        self._numbers: dict[tuple, int] = {}
        self._next = count()

    def number(self, *described: object) -> int:
        number = self._numbers.get(described)
        if number is None:
            if len(self._numbers) >= _MOST_KINDS:  # scalings that change at every step
                self._numbers.clear()
            number = self._numbers.setdefault(described, next(self._next))
        return number


class Plain:
    """Such a layer, as it was when this was made.

    Args:
        layer: a LoRA layer without a shared adapter.
        experts: (column of the routing weights, adapter name) of those that it has.
        kinds: of all layers that share routing weights.
        stack: all A (R, in) and all B (R, out), where they are kept; else each pass stacks what the parameters then are.
    """

    def __init__(
        self,
        layer: LoraLinear,
        expert_names: list[str],
        experts: list[tuple[int, str]],
        kinds: Kinds,
        stack: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.kinds, self.stack = kinds, stack
        shrinks, expands = _parts(layer)
        self._parts = (layer._modules["base_layer"], dict(shrinks), dict(expands), dict(layer.scaling), list(expert_names))
        self._base_forward = layer.base_layer if stack is None else layer.base_layer.forward  # what is kept, nobody watches
        self._shrinks, self._expands = ([part[name]._parameters for _, name in experts] for part in (shrinks, expands))
        weights = self.shrinks
        self._shapes = list(map(_SHAPE, weights))
        self.signature: Signature = tuple((e, layer.scaling[name], len(a)) for (e, name), a in zip(experts, weights, strict=True))
        self.rank, self.dtype, self.device = sum(map(len, weights)), weights[0].dtype, weights[0].device
        self.base_dtype = self._parts[0].weight.dtype
        self._width = self._expands[0]["weight"].shape[0]
        self.alone = Together({layer: self})
        self.together = self.alone  # with those that were last found to read the same

    @property
    def has_company(self) -> bool:
        return len(self.together.members) > 1

    @property
    def shrinks(self) -> list[Tensor]:
        """Each A (r, in), as it is now."""
        return list(map(_WEIGHT, self._shrinks))

    @property
    def sums(self) -> Sums:
        return Sums(self.signature, self.shrinks, list(map(_WEIGHT, self._expands)), self.stack)

    def is_current(self, layer: LoraLinear, expert_names: list[str]) -> bool:
        """Whether the layer is still of the same parts, scaled alike. Weights may have changed, and are read anew."""
        parts = (layer._modules["base_layer"], *_parts(layer), layer.scaling, expert_names)
        if parts != self._parts or not fits(layer):
            return False
        weights = self.shrinks
        first = weights[0]
        is_same = first.dtype is self.dtype and parts[0].weight.dtype is self.base_dtype and first.device == self.device
        return is_same and list(map(_SHAPE, weights)) == self._shapes

    def mixed(self, x: Tensor, spread: Spread) -> Tensor:
        """x: (B, S, in) -> (B, S, out)."""
        return self.finished(x, spread, self.alone.hidden(x, spread))

    def finished(self, x: Tensor, spread: Spread, hidden: Tensor | None) -> Tensor:
        """hidden: A x times the factors, (T, R), or None where the grouped way costs less."""
        result = self._base_forward(x)
        if hidden is None:
            return add_grouped(result, x.to(self.dtype), spread, self.sums)
        is_cast = hidden.dtype is not self.dtype or result.dtype is not self.base_dtype  # under autocast, say
        if is_cast or not result.is_contiguous():
            return add_dense(result, x.to(self.dtype), spread, self.sums)
        expand = torch.cat(list(map(_WEIGHT, self._expands)), dim=1).t() if self.stack is None else self.stack[1]
        if self.dtype is not self.base_dtype:
            return (result + torch.mm(hidden, expand).view(result.shape)).to(result.dtype)
        result.view(-1, self._width).addmm_(hidden, expand)
        return result


class Together:
    """The A of layers that read one tensor. members: in the order in which they read it.

    ahead: what its first has worked out for the others in a graph, where each layer has a spread of its own.
    """

    def __init__(self, members: dict[LoraLinear, Plain]) -> None:
        self.members = members
        self.ahead = Ahead()
        self._plains = list(members.values())
        self._widths = [plain.rank for plain in self._plains]
        # Where all have the same, one layer's factors are everyone's.
        self._repeats = len(self._plains) if len({plain.signature for plain in self._plains}) == 1 else 1
        parts = self._plains[:1] if self._repeats > 1 else self._plains
        self._signature = sum((plain.signature for plain in parts), ())
        stacks = [plain.stack[0] for plain in self._plains if plain.stack is not None]
        self._stack = None if len(stacks) < len(members) else (stacks[0] if len(stacks) == 1 else torch.cat(stacks)).t()
        first = self._plains[0]
        self._dtype = first.dtype
        self._kind = first.kinds.number(self._signature, first.sums.kind, first.device)

    def hidden(self, x: Tensor, spread: Spread) -> Tensor | None:
        """x: (B, S, in) -> A x times the factors, (T, sum of R), or None where the grouped way costs the first less."""
        factors = spread.plans.get(self._kind)
        if factors is None:
            factors = spread.plans[self._kind] = self._plan(spread)
        if factors is False:
            return None
        hidden = torch.mm(x.flatten(0, 1).to(self._dtype), self._shrink if self._stack is None else self._stack)
        if hidden.dtype is not factors.dtype:
            return (hidden.unflatten(1, (self._repeats, -1)) * factors.unsqueeze(1)).to(hidden.dtype).flatten(1)
        if self._repeats == 1:
            return hidden.mul_(factors)
        hidden.view(len(hidden), self._repeats, -1).mul_(factors.unsqueeze(1))
        return hidden

    def parts(self, hidden: Tensor | None) -> dict[LoraLinear, tuple[Plain, Tensor | None]]:
        """What `hidden` gave, for each layer."""
        of_each = [None] * len(self._plains) if hidden is None else hidden.split_with_sizes(self._widths, 1)
        return dict(zip(self.members, zip(self._plains, of_each, strict=True), strict=True))

    def dissolve(self) -> None:
        """Refers to nobody any longer: its members refer to it, and such circles would live until they are looked for."""
        self.members.clear()
        self._plains.clear()
        self.ahead, self._stack = Ahead(), None

    @property
    def _shrink(self) -> Tensor:
        """All A, (in, sum of R)."""
        return torch.cat([weight for plain in self._plains for weight in plain.shrinks]).t()

    def _plan(self, spread: Spread) -> Tensor | bool:
        """The factors, (T|1, sum of R), or False where the grouped way costs less."""
        first = self._plains[0]
        if first.device.type == "cpu" and not torch.compiler.is_compiling() and first.sums.cheaper_grouped(spread):
            return False
        return spread.factors_of_tokens(self._signature).to(first.device)


def fits(layer: LoraLinear) -> bool:
    """Whether a layer with experts is its base, which nobody watches, and sums of them, whose weights are parameters like it."""
    if layer.lora_variant or layer.merged_adapters or layer._disable_adapters or layer.training:
        return False
    base = layer._modules["base_layer"]
    if type(base) not in FRESH or base._forward_hooks or base._forward_pre_hooks or True in layer.lora_bias.values():
        return False
    owners = map(_PARAMETERS, chain.from_iterable(map(dict.values, _parts(layer))))
    return all(map(contains, owners, repeat("weight")))


def may_join(plains: list[Plain | None]) -> bool:
    """Whether one product for all of these layers is quicker than one for each."""
    first = plains[0]
    return all(
        plain is not None and (plain.device, plain.dtype) == (first.device, first.dtype) and plain.rank < MANY for plain in plains
    )


def _parts(layer: LoraLinear) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """A and B of every adapter, without what a ModuleDict takes to say so."""
    modules = layer._modules
    return modules["lora_A"]._modules, modules["lora_B"]._modules
