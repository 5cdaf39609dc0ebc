"""The published design, written to be read: in every routed Linear a loop over the experts; no cache, no state.

In float64 it is the judge's reference; in the working dtype the subject `naive-loop`, whose error sets the tolerance.

B rows, S tokens, E experts, L routed layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from harness.artifact import Adapter, Artifact, load_base, versions_of
from harness.loop_routers import linear, make_router, routers_of
from harness.loop_versions import LoopVersions, parameter, plain
from harness.routers import in_order

# What a layer calls the adapter that is no expert.
SHARED = "shared adapter"


class LoopLinear(nn.Module):
    """y = W x + b + sum_e w_e s_e B_e A_e x, one expert after the other, on any Linear-like base layer.

    shared: an adapter that is no expert, added with weight 1 unless the adapters are off.
    """

    def __init__(
        self, base_layer: nn.Module, adapters: Mapping[str, Adapter], names: tuple[str, ...], shared: Adapter | None = None
    ) -> None:
        super().__init__()
        self.base_layer, self.names = base_layer, names
        stored = base_layer.weight.dtype
        dtype = stored if stored.is_floating_point else torch.float32  # of the experts on a quantised base
        held = adapters if shared is None else {**adapters, SHARED: shared}
        self.lora_A = nn.ModuleDict({name: linear(a.lora_A, dtype) for name, a in held.items()})
        self.lora_B = nn.ModuleDict({name: linear(a.lora_B, dtype) for name, a in held.items()})
        self.scaling = {name: a.scaling for name, a in held.items()}
        for name, adapter in held.items():
            if adapter.bias is not None:
                self.lora_B[name].bias = parameter(adapter.bias, dtype)
        magnitudes = {name: parameter(a.magnitude, dtype) for name, a in held.items() if a.magnitude is not None}
        self.magnitudes = nn.ParameterDict(magnitudes)
        self.is_off = False  # the base model
        self.weights: Tensor | None = None  # of the pass under way, (B, S, E)
        self.gates: tuple[nn.Module, ...] = ()  # what routes this layer's own input

    def forward(self, x: Tensor) -> Tensor:
        if self.gates:
            self.weights = self.gates[0](x)
        if self.is_off:
            return self.base_layer(x)
        return self.with_shared(x) if self.weights is None else self.mix(x, self.weights)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        y = self.with_shared(x)
        for expert, name in enumerate(self.names):
            if name in self.lora_A:
                y = y + weights[..., expert, None].to(x.dtype) * self.delta(name, x)
        return y

    def with_shared(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.delta(SHARED, x) if SHARED in self.lora_A else y

    def delta(self, name: str, x: Tensor) -> Tensor:
        low_rank = self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return low_rank if name not in self.magnitudes else self.with_magnitude(name, x, low_rank)

    def with_magnitude(self, name: str, x: Tensor, low_rank: Tensor) -> Tensor:
        """DoRA (arXiv 2402.09353, eq. 5) minus W x; in training the norm is a constant (section 4.3)."""
        layer = plain(self.base_layer)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        changed = weight + self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight
        scale = self.magnitudes[name] / changed.detach().norm(dim=1)
        return (scale - 1) * nn.functional.linear(x, weight) + scale * low_rank


class LoopFeedForward(nn.Module):
    """y = sum_e w_e FFN_e(x): the whole network once for each expert, with that expert's adapters alone in its Linears.

    A router with the rule "switch" hands the input of some tokens on instead; see harness/oracles/feed_forward.py.
    """

    def __init__(self, network: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.network, self.num_experts = network, num_experts
        self.is_off = False
        self.weights: Tensor | None = None
        self.gates: tuple[nn.Module, ...] = ()
        self.mask: Tensor | None = None  # of the pass under way, (B, S)

    def forward(self, x: Tensor) -> Tensor:
        if self.gates:
            self.weights = self.gates[0](x)
        if self.is_off:
            return self.network(x)
        rule = getattr(self.gates[0], "rule", None) if self.gates else None
        if rule is None or rule.name != "switch":
            return self.mix(x, self.weights)
        return x if rule.mixlora_switch == "inference" else self.up_to(rule.expert_capacity, x, self.weights)

    def up_to(self, capacity: int, x: Tensor, weights: Tensor) -> Tensor:
        """w_e FFN_e(x) for the first tokens of a row that chose e, as many as the capacity; w_e x for the others."""
        share, choice = weights.max(dim=-1, keepdim=True)
        runs = torch.zeros_like(choice, dtype=torch.bool)
        for row in range(len(x)):
            used = [0] * self.num_experts
            for token in range(x.shape[1]):
                if self.mask is None or self.mask[row, token]:
                    used[int(choice[row, token])] += 1
                    runs[row, token] = used[int(choice[row, token])] <= capacity
        return torch.where(runs, self.mix(x, weights), share.to(x.dtype) * x)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(weights[..., e, None].to(x.dtype) * self.alone(e, x) for e in range(self.num_experts))

    def alone(self, expert: int, x: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(torch.tensor(expert, device=x.device), self.num_experts).to(x.dtype)
        inside = [module for module in self.network.modules() if isinstance(module, LoopLinear)]
        for layer in inside:
            layer.weights = one_hot.expand(*x.shape[:2], -1)
        y = self.network(x)
        for layer in inside:
            layer.weights = None
        return y


class LoopModel(nn.Module):
    """Base + experts + router with the forward pass that every judged model has. It keeps nothing between calls but
    `last_routing_weights`, has no KV cache, and recomputes everything.

    A unit is what is mixed as one: a Linear, or a whole feed-forward network.
    """

    def __init__(self, artifact: Artifact, dtype: torch.dtype, attention: str | None = None) -> None:
        super().__init__()
        self.base: PreTrainedModel = load_base(artifact, dtype, attention)
        self.expert_names = list(artifact.names)
        self.balance = artifact.balance
        self.balance_kind = artifact.balance_kind
        self.features = artifact.router.features if artifact.router else None
        self._versions = self._wrap_versions(artifact, dtype)
        self._layers = self._wrap(artifact)
        self._networks = self._wrap_networks(artifact)
        self.router = make_router(in_order(artifact.router, list(self.units())), dtype)
        self.last_routing_weights: Tensor | None = None
        self.eval()

    def _wrap_versions(self, artifact: Artifact, dtype: torch.dtype) -> dict[str, LoopVersions]:
        own = [versions_of(expert) for expert in artifact.experts]
        found = {}
        for path in artifact.versioned:
            versions = {expert: modules[path] for expert, modules in enumerate(own) if path in modules}
            found[path] = LoopVersions(self.base.get_submodule(path), versions, dtype)
            self._put(path, found[path])
        return found

    def _wrap(self, artifact: Artifact) -> dict[str, LoopLinear]:
        layers, experts = {}, dict(zip(artifact.names, artifact.experts, strict=True))
        wanted = {*artifact.modules, *artifact.shared}
        for path in [name for name, _ in self.base.named_modules() if name in wanted]:
            adapters = {name: expert[path] for name, expert in experts.items() if path in expert}
            layers[path] = LoopLinear(self.base.get_submodule(path), adapters, artifact.names, artifact.shared.get(path))
            self._put(path, layers[path])
        return layers

    def _wrap_networks(self, artifact: Artifact) -> dict[str, LoopFeedForward]:
        networks = {}
        for path in [name for name, _ in self.base.named_modules() if name in set(artifact.feed_forwards)]:
            networks[path] = LoopFeedForward(self.base.get_submodule(path), artifact.num_experts)
            self._put(path, networks[path])
        return networks

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, attribute = path.rpartition(".")
        setattr(self.base.get_submodule(parent), attribute, module)

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @property
    def config(self) -> object:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def routed_layers(self) -> dict[str, LoopLinear]:
        """Every Linear that holds an adapter."""
        return dict(self._layers)

    def units(self) -> dict[str, LoopLinear | LoopFeedForward]:
        """What is mixed as one and has its own place in weights per layer, in the base model's order of modules."""
        experts = set(self.expert_names)
        return self._networks or {path: layer for path, layer in self._layers.items() if experts & set(layer.scaling)}

    def unwrapped(self) -> PreTrainedModel:
        """Puts the base layers back and returns the base model."""
        for path, network in self._networks.items():
            self._put(path, network.network)
        for path, layer in self._layers.items():
            self._put(path, layer.base_layer)
        for path, versions in self._versions.items():
            self._put(path, versions.module)
        return self.base

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        routing_weights: Tensor | None = None,
        expert_id: int | Tensor | None = None,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids (B, S), routing_weights (B, S|1, E) or (B, S, L, E), expert_id int or (B,) -> logits (B, S, V)."""
        weights = self.explicit_weights(input_ids, routing_weights, expert_id)
        chosen_by_router = weights is None
        if chosen_by_router and self.features != "layer":
            weights = self.router(self.router_features(input_ids, attention_mask))
        with self._routing(weights, attention_mask):
            logits = self.base(**_inputs(input_ids, attention_mask)).logits
            used = weights if weights is not None else self._layer_weights()
        self.last_routing_weights = used.detach()
        if labels is None:
            return MoeCausalLMOutputWithPast(logits=logits)
        loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        auxiliary = self.load_balance(used, attention_mask) if chosen_by_router else None
        if auxiliary is not None:
            loss = loss + self.balance.get("router_aux_loss_coef", 0.01) * auxiliary
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=auxiliary, logits=logits)

    def explicit_weights(self, ids: Tensor, weights: Tensor | None, expert_id: int | Tensor | None) -> Tensor | None:
        """The weights that the caller asked for, one row per token; None when the router decides."""
        if expert_id is not None:
            rows = torch.as_tensor(expert_id, device=ids.device).expand(ids.shape[0])
            weights = nn.functional.one_hot(rows, self.num_experts).to(self.dtype)[:, None]
        if weights is None:
            return None
        return weights.to(ids.device).expand(ids.shape[0], ids.shape[1], *weights.shape[2:])

    @torch.no_grad()
    def router_features(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the router looks at: (B, S, H)."""
        if self.features == "embedding":
            with self._off():
                return self.base.get_input_embeddings()(ids)
        everything = torch.ones(*ids.shape, self.num_experts, dtype=self.dtype, device=ids.device)
        with self._routing(everything) if self.features == "all_experts" else self._off():
            return self.base.base_model(**_inputs(ids, mask)).last_hidden_state

    def load_balance(self, weights: Tensor, mask: Tensor | None) -> Tensor | None:
        """Mean squared distance of the mean weights P_e from 1/E, or E * sum_e f_e P_e (arXiv 2101.03961 eq. 4)."""
        tokens = weights if mask is None else weights[mask.bool()]
        tokens = tokens.reshape(-1, self.num_experts)
        mean = tokens.mean(dim=0)
        if self.balance_kind == "mse":
            return ((mean - 1 / self.num_experts) ** 2).mean()
        if self.balance_kind == "switch":
            share = nn.functional.one_hot(tokens.argmax(dim=-1), self.num_experts).to(mean.dtype).mean(dim=0)
            return self.num_experts * (share * mean).sum()
        return mean.new_zeros(())

    @torch.no_grad()
    def base_logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, V) of the base model: experts and shared adapter off."""
        with self._off():
            return self.base(**_inputs(ids, mask)).logits

    @torch.no_grad()
    def router_scores(self, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """What every decision of the router was made on, each (B, S, n), in the order of the decisions."""
        routers = routers_of(self.router)
        for router in routers:
            router.recorded = []
        self(ids, mask)
        found = [scores for router in routers for scores in router.recorded]
        for router in routers:
            router.recorded = None
        return found

    def _layer_weights(self) -> Tensor:
        return torch.stack([unit.weights for unit in self.units().values()], dim=2)

    @contextmanager
    def _off(self) -> Iterator[None]:
        everything = [*self._layers.values(), *self._networks.values(), *self._versions.values()]
        for module in everything:
            module.is_off = True
        try:
            yield
        finally:
            for module in everything:
                module.is_off = False

    @contextmanager
    def _routing(self, weights: Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
        """weights (B, S, E) or (B, S, L, E); None where the router looks at each unit's own input. mask: (B, S), 0 at padding."""
        routers = routers_of(self.router) if weights is None else []
        units = list(self.units().values())
        for versions in self._versions.values():
            versions.weights = weights
        for network in self._networks.values():
            network.mask = mask
        for index, unit in enumerate(units):
            unit.gates = (routers[index if len(routers) > 1 else 0],) if routers else ()
            unit.weights = weights[:, :, index] if weights is not None and weights.dim() == 4 else weights
        try:
            yield
        finally:
            for unit in units:
                unit.gates, unit.weights = (), None


def _inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor | bool | None]:
    """Positions count from the first real token, so that padding on the left changes nothing."""
    positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
