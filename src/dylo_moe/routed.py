"""The routed layer: y = W x + b + sum_e w_e s_e B_e A_e x, the sum in the way that does the least work (`sums`).

Experts that are not such a sum (DoRA) run one by one through PEFT's own code: y += w_e (f_e(x) - f(x)).

Shapes: B batch, S sequence, E experts, L routed layers, R sum of the experts' ranks in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.errors import RoutingError, UnknownExpert
from dylo_moe.gradients import add_lean
from dylo_moe.held import Held
from dylo_moe.quantised import keep_scales
from dylo_moe.spread import Spread
from dylo_moe.sums import Sums, add_dense, add_grouped
from dylo_moe.threads import PerThread, ThreadState

# None: adapters off. int: that expert alone. Tensor: (B|1, S|1, E) or (B, S, L, E). nn.Module: routes each layer's own input;
# a ModuleList has one gate per layer, any other module is shared by all of them.
Route = None | int | Tensor | nn.Module

# Base layers whose output is nobody else's.
_FRESH = (nn.Linear, Conv1D)

# PEFT's layers that round an adapter's output to the base's dtype before they add it.
_ROUNDS_DELTA = ("Linear4bit", "Linear8bitLt", "AwqLoraLinear", "EetqLoraLinear")


class _Now(ThreadState):
    """What one thread's passes mix."""

    def __init__(self) -> None:
        self.asked: int | Tensor | None = None
        self.kept_positions: int | Tensor | None = None
        self.layer_weights: dict[int, Tensor] = {}
        self.held: Held | None = None
        self._routes: list[Route] = []
        self._spreads: list[Spread | None] = []


class Mixture:
    """What the routed layers of one model mix at this moment. One object per model, shared by its layers.

    A layer outside of a routed forward pass refuses to run: falling back to any mixture would be silently wrong.

    Args:
        expert_names: adapters in the order of the routing weights' columns.
        shared: an adapter that is no expert: added with weight 1 wherever it exists, unless the adapters are off.

    Attributes:
        active_expert: the one that runs in every pass of which nothing else was asked; None: the router decides.
    """

    asked = PerThread()  # of the passes under way, instead of the router's choice
    kept_positions = PerThread()  # the pass's logits_to_keep
    layer_weights = PerThread()
    held = PerThread()  # while nobody can change a weight
    _routes = PerThread()
    _spreads = PerThread()  # of the routes

    def __init__(self, expert_names: list[str], shared: str | None = None) -> None:
        self.expert_names = expert_names
        self.shared = shared
        self.num_layers = 0
        self.active_expert: int | None = None
        self.now = _Now()
        self._layouts: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def forced(self) -> int | Tensor | None:
        """What passes use instead of the router's choice."""
        return self.active_expert if self.asked is None else self.asked

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @property
    def route(self) -> Route:
        if not self._routes:
            raise RoutingError("a routed layer was called outside of its model's forward; call the model itself")
        return self._routes[-1]

    @property
    def active(self) -> bool:
        return bool(self._routes)

    def enter(self, route: Route) -> None:
        self._routes.append(route)
        self._spreads.append(None)

    def leave(self) -> None:
        self._routes.pop()
        self._spreads.pop()

    @contextmanager
    def asking(self, route: int | Tensor | None) -> Iterator[None]:
        """Passes inside are asked for this route, whatever those around them are; None leaves it to the router.

        A pass that Ctrl-C ended has not left: torch then calls no hook. It is left here.
        """
        asked, depth = self.asked, len(self._routes)
        self.asked = route
        try:
            yield
        finally:
            self.asked = asked
            del self._routes[depth:], self._spreads[depth:]

    def spread(self, weights: Tensor, shape: tuple[int, int]) -> Spread:
        """The weights (B|1, S|1, E) over an input of (B, S); the route's own are worked out once.

        A checkpointed block has a route of its own, in its first pass as when it is recomputed: it records the same.
        """
        if torch.compiler.is_compiling():
            return Spread(weights, shape, {})
        if not self._routes or weights is not self._routes[-1]:
            return Spread(weights, shape, self._layouts)
        kept = self._spreads[-1]
        if kept is None or kept.shape != shape or kept.grows != torch.is_grad_enabled():
            kept = self._spreads[-1] = Spread(weights, shape, self._layouts)
        return kept

    def pass_spread(self, x: Tensor) -> Spread | None:
        """The spread of the pass over an input x (B, S, in); None unless all layers have the same weights."""
        known = self._spreads[-1] if self._spreads else None
        if known is not None and known.shape == x.shape[:2]:
            return known
        route = self.route
        return self.spread(route, x.shape[:2]) if isinstance(route, Tensor) and route.dim() == 3 else None

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        self.enter(route)
        try:
            yield
        finally:
            self.leave()

    def weights_at(self, route: Tensor | nn.Module, length: int, *, is_readout: bool) -> Tensor:
        """The weights of a module that is no routed layer of its own, (B|1, length|1, E).

        is_readout: with logits_to_keep, it sees the last positions, or the kept ones, only.

        Raises:
            RoutingError: each layer has its own weights, and this module is none of them.
        """
        if isinstance(route, nn.Module) or route.dim() == 4:
            raise RoutingError("experts with modules or biases of their own need one routing for all layers, not one per layer")
        return self.kept(route, length) if is_readout else route

    def kept(self, weights: Tensor, length: int) -> Tensor:
        """The weights (B, S, E) at the `length` positions that the readout sees."""
        if isinstance(self.kept_positions, Tensor) and weights.shape[1] > 1:
            return weights[:, self.kept_positions]
        return weights[:, -length:] if length < weights.shape[1] else weights

    def check_expert(self, expert_id: int) -> int:
        """Any integer type, NumPy's too, as an int. Raises UnknownExpert unless 0 <= expert_id < num_experts."""
        if isinstance(expert_id, bool) or not isinstance(expert_id, Integral) or not 0 <= expert_id < self.num_experts:
            raise UnknownExpert(f"expert_id={expert_id!r}, but should be an integer from 0 to {self.num_experts - 1}")
        return int(expert_id)


class RoutedLinear(LoraLinear):
    """A PEFT LoRA Linear (or Conv1D) whose adapters are mixed per token instead of summed.

    It is the PEFT layer with another forward: parameters, buffers, scalings and names are the layer's own objects, so
    state dicts, optimizers and PEFT's methods see what they saw before, and `source` can be put back untouched.

    index: the layer's place in per-layer weights; None where no expert, only the shared adapter, has weights on it.
    """

    def __init__(self, layer: LoraLinear, mixture: Mixture, index: int | None, *, is_readout: bool = False) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.source = (layer,)  # a tuple, so that it is not registered as a child
        self.mixture = mixture
        self.index = index
        self.is_readout = is_readout
        self.rounds_delta = type(layer).__name__ in _ROUNDS_DELTA

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: (B, S, in) -> (B, S, out), mixed as the model's Mixture says."""
        if self.mixture.held is not None and not torch.is_grad_enabled():
            plain = self.mixture.held.plain.get(id(self))
            spread = None if plain is None else self.mixture.pass_spread(x)
            if spread is not None:
                return plain.mixed(x, spread)
        route = self.mixture.route
        if self.merged:
            raise RoutingError("an adapter is merged into the base weights; call unmerge_adapter() before routing")
        own_bias = getattr(self.get_base_layer(), "expert_bias", None) if self.lora_variant else None
        if own_bias is None:
            base = result = self.base_layer(x, *args, **kwargs)
        else:
            with self.mixture.using(None):  # a variant's delta is counted from the base without an expert's bias
                base = self.base_layer(x, *args, **kwargs)
            result = own_bias.added(base, self.get_base_layer().bias)
        if route is None or self.disable_adapters:
            return result
        if self.mixture.shared is not None:
            result = self._add_expert(result, x, self.mixture.shared, base)
        if isinstance(route, int):
            return self._add_expert(result, x, self.mixture.expert_names[route], base)
        experts = self.experts_here
        return self._add_mixture(result, x, self._weights_here(route, x), base, experts) if experts else result

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """The layer alone. x: (B, S, in); weights: (B, S, E), or (B, 1, E) for the whole sequence -> (B, S, out)."""
        base = result = self.base_layer(x)
        if self.mixture.shared is not None:
            result = self._add_expert(result, x, self.mixture.shared, base)
        experts = self.experts_here
        return self._add_mixture(result, x, weights, base, experts) if experts else result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise RoutingError("a routed layer cannot be merged into the base; call detach_router first")

    def delete_adapter(self, adapter_name: str) -> None:
        raise RoutingError("an expert of a routed model cannot be deleted; call detach_router first")

    @property
    def experts_here(self) -> list[tuple[int, str]]:
        """(column of the routing weights, adapter name) of the experts that have an adapter on this layer."""
        here = self.lora_A._modules  # looked at in every pass; a ModuleDict's own methods take longer than a small product
        return [(e, name) for e, name in enumerate(self.mixture.expert_names) if name in here]

    def _weights_here(self, route: Tensor | nn.Module, x: Tensor) -> Tensor:
        if isinstance(route, nn.Module):
            gate = route[self.index] if isinstance(route, nn.ModuleList) else route
            weights = self.mixture.layer_weights[self.index] = gate(x)
            return weights
        weights = route[:, :, self.index] if route.dim() == 4 else route
        return self.mixture.kept(weights, x.shape[1]) if self.is_readout else weights

    def _add_expert(self, result: Tensor, x: Tensor, name: str, base: Tensor) -> Tensor:
        # The same operations in the same order as stock PEFT with this adapter active: bitwise equal to it.
        if name not in self.lora_A:
            return result
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        if name in self.lora_variant:
            output = self._run_variant(name, x, base)
            return (output if result is base else result + (output - base)).to(result.dtype)
        delta = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return (result + (delta.to(result.dtype) if self.rounds_delta else delta)).to(result.dtype)

    def _add_mixture(self, result: Tensor, x: Tensor, weights: Tensor, base: Tensor, experts: list[tuple[int, str]]) -> Tensor:
        self._check_shapes(x, weights)
        variants = [(e, name) for e, name in experts if name in self.lora_variant] if self.lora_variant else []
        sums = [expert for expert in experts if expert not in variants] if variants else experts
        weights = weights.to(x.device)
        if sums:
            is_shared = result is base and (variants or self.base_layer._forward_hooks or type(self.base_layer) not in _FRESH)
            result = self._add_sums(result.clone() if is_shared else result, x, weights, sums)
        for e, name in variants:
            output = self._run_variant(name, self._cast_input_dtype(x, self.lora_A[name].weight.dtype), base)
            wide = weights[..., e : e + 1].to(torch.promote_types(weights.dtype, torch.float32))
            result = (result + wide * (output - base)).to(result.dtype)
        return result

    def _run_variant(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output with this adapter alone, by PEFT's own code."""
        output = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=base)
        keep_scales(self.get_base_layer())
        return output

    def _add_sums(self, result: Tensor, x: Tensor, weights: Tensor, experts: list[tuple[int, str]]) -> Tensor:
        """Adds the experts that are sums of deltas. result: nobody else's."""
        if any(self.lora_bias.values()):
            result = self._add_lora_biases(result, weights, experts)
        sums = self._sums(experts)
        if self._drops_out(experts):
            x = self._cast_input_dtype(x, sums.dtype)
            # Each expert draws its own mask, as it does in PEFT.
            hidden = torch.cat([self.lora_A[name](self.lora_dropout[name](x)) for _, name in experts], dim=-1)
            return add_dense(result, x, self.mixture.spread(weights, x.shape[:2]), sums, hidden)
        return self._add_stack(result, x, weights, sums)

    def _add_stack(self, result: Tensor, x: Tensor, weights: Tensor, sums: Sums) -> Tensor:
        """The way that does less work. result: nobody else's."""
        spread = self.mixture.spread(weights, x.shape[:2])
        # A weight of 0 that learns needs its expert's output; on a GPU, counting would make the host wait.
        learns = torch.is_grad_enabled() and weights.requires_grad
        if not learns and weights.device.type == "cpu" and not torch.compiler.is_compiling() and sums.cheaper_grouped(spread):
            return add_grouped(result, x.to(sums.dtype), spread, sums)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return add_lean(result, x, spread, sums)
        return add_dense(result, x.to(sums.dtype), spread, sums)

    def _sums(self, experts: list[tuple[int, str]]) -> Sums:
        if self.mixture.held is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            plain_base = self.base_layer if self._is_plain() else None
            return self.mixture.held.sums_of(self, lambda: self._sums_now(experts), plain_base=plain_base)
        return self._sums_now(experts)

    def _is_plain(self) -> bool:
        """Whether the layer is its base, which nobody watches, and the sums of all its experts."""
        own = self.lora_variant or self.is_readout or self.mixture.shared is not None or any(self.lora_bias.values())
        base = self.base_layer
        watched = type(base) not in _FRESH or base._forward_hooks or base._forward_pre_hooks
        return not (own or watched or self.merged or self.disable_adapters or self.training)

    def _sums_now(self, experts: list[tuple[int, str]]) -> Sums:
        lora_A, lora_B, scaling = self.lora_A._modules, self.lora_B._modules, self.scaling
        shrinks = [lora_A[name].weight for _, name in experts]
        signature = tuple((e, scaling[name], shrink.shape[0]) for (e, name), shrink in zip(experts, shrinks, strict=True))
        return Sums(signature, shrinks, [lora_B[name].weight for _, name in experts])

    def _drops_out(self, experts: list[tuple[int, str]]) -> bool:
        dropouts = [self.lora_dropout[name] for _, name in experts] if self.training else []
        return any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in dropouts)

    def _add_lora_biases(self, result: Tensor, weights: Tensor, experts: list[tuple[int, str]]) -> Tensor:
        experts = [(e, name) for e, name in experts if self.lora_bias[name]]
        if not experts:
            return result
        biases = torch.stack([self.lora_B[name].bias * self.scaling[name] for _, name in experts])  # (experts, out)
        return (result + weights[..., [e for e, _ in experts]].to(biases.dtype) @ biases).to(result.dtype)

    def expert_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of the adapter `name` on this layer."""
        for part in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if name in part:
                yield from part[name].parameters()

    def _check_shapes(self, x: Tensor, weights: Tensor) -> None:
        fits = x.dim() == 3 and weights.dim() == 3 and weights.shape[-1] == self.mixture.num_experts
        if not (fits and weights.shape[0] in (1, x.shape[0]) and weights.shape[1] in (1, x.shape[1])):
            raise RoutingError(
                f"routing weights of shape {tuple(weights.shape)} for an input of shape {tuple(x.shape)}, but should be "
                f"(batch, sequence, {self.mixture.num_experts})"
            )


class RoutedCheckpoint:
    """A gradient-checkpointing function that recomputes a block under the route of its forward pass.

    The recomputation runs inside backward(), when the model's forward has long returned or another one has begun.
    """

    def __init__(self, checkpoint: Callable, mixture: Mixture) -> None:
        self.checkpoint = checkpoint
        self.mixture = mixture

    def __call__(self, function: Callable, *args: object) -> object:
        route = self.mixture.route

        def routed(*inputs: object) -> object:
            with self.mixture.using(route):
                return function(*inputs)

        return self.checkpoint(routed, *args)
