"""The routed layer: y = W x + b + sum_e w_e s_e B_e A_e x, the sum in the way that does the least work (`sums`).

Experts that are not such a sum (DoRA) run one by one through PEFT's own code: y += w_e (f_e(x) - f(x)).

Shapes: B batch, S sequence, E experts, L routed layers, R sum of the experts' ranks in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dylo_moe.errors import RoutingError
from dylo_moe.gradients import add_lean
from dylo_moe.held import EVERY, EVERY_PRE
from dylo_moe.mixture import Mixture
from dylo_moe.plain import FRESH, Plain, Together, fits, may_join
from dylo_moe.quantised import keep_scales
from dylo_moe.sums import Sums, add_dense, add_grouped

# PEFT's layers that round an adapter's output to the base's dtype before they add it.
_ROUNDS_DELTA = ("Linear4bit", "Linear8bitLt", "AwqLoraLinear", "EetqLoraLinear")


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
        self.siblings: tuple[RoutedLinear, ...] = ()  # that read the same tensor after this one
        self._plain: Plain | None = None  # of the last pass that went this way
        self.rounds_delta = type(layer).__name__ in _ROUNDS_DELTA

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: (B, S, in) -> (B, S, out), mixed as the model's Mixture says."""
        if not (torch.is_grad_enabled() or args or kwargs):
            result = self._short_way(x)
            if result is not None:
                return result
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

    def _short_way(self, x: Tensor) -> Tensor | None:
        """The mixture as `plain` computes it; None where it cannot."""
        mixture = self.mixture
        held = mixture.now.held
        kept = None if held is None else held.plain.get(id(self))
        if kept is None and (self.is_readout or mixture.shared is not None):
            return None
        spread = mixture.pass_spread(x)
        if spread is None:
            return None
        if kept is not None and not kept.has_company:
            return kept.mixed(x, spread)
        known = (spread if kept is None else kept.together).ahead.taken(x, self)
        if known is not None:
            plain, hidden = known
            return plain.finished(x, spread, hidden)
        plain = self._plain_now()
        if plain is None or x.dtype is not plain.base_dtype or x.device != plain.device:
            return None
        if not self.siblings:
            return plain.mixed(x, spread)
        together = self._together(plain) if kept is None else kept.together
        parts = together.parts(together.hidden(x, spread))
        _, hidden = parts.pop(self)
        (spread if plain.stack is None else together).ahead.put(x, parts)
        return plain.finished(x, spread, hidden)

    def _plain_now(self) -> Plain | None:
        """The layer as `plain` wants it, if it is so now."""
        held = self.mixture.held
        kept = None if held is None else held.plain.get(id(self))
        if kept is not None or torch.compiler.is_compiling():
            return kept
        names, plain = self.mixture.expert_names, self._plain
        if plain is None or not plain.is_current(self, names):
            experts = self.experts_here
            plain = self._plain = Plain(self, names, experts, self.mixture.kinds) if experts and fits(self) else None
        if held is not None and plain is not None:
            sums = held.sums_of(self, lambda: plain.sums)
            if sums.stack is not None:
                return held.plain.setdefault(id(self), Plain(self, names, self.experts_here, self.mixture.kinds, sums.stack))
        return plain

    def _together(self, plain: Plain) -> Together:
        """With its siblings, where one product for all of them is quicker."""
        layers = (self, *self.siblings)
        if EVERY or EVERY_PRE or any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return plain.alone  # a hook may write into what they read
        plains = [plain, *(layer._plain_now() for layer in self.siblings)]
        if plains == list(plain.together.members.values()):
            return plain.together
        if not may_join(plains):
            return plain.alone
        together = Together(dict(zip(layers, plains, strict=True)))
        for one in plains:
            one.together = together
        return together

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
            is_shared = result is base and (variants or self.base_layer._forward_hooks or type(self.base_layer) not in FRESH)
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
        if sums.shrinks[0].is_meta and not x.is_meta:
            raise RoutingError("experts are offloaded (on the device meta), but should stay on a device; see device_map")
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
        held = self.mixture.held
        if held is None or torch.is_grad_enabled():
            return self._sums_now(experts)
        if torch.compiler.is_compiling():
            return held.kept_sums(self) or self._sums_now(experts)
        return held.sums_of(self, lambda: self._sums_now(experts))

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
        route, tokens = self.mixture.route, self.mixture.tokens

        def routed(*inputs: object) -> object:
            with self.mixture.using(route, tokens):
                return function(*inputs)

        return self.checkpoint(routed, *args)
