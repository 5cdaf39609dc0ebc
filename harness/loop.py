"""The published design, written to be read: in every routed Linear a loop over the experts; no cache, no state.

In float64 it is the judge's reference; in the working dtype the subject `naive-loop`, whose error sets the tolerance.

B rows, S tokens, E experts, L routed layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from harness.artifact import Adapter, Artifact, Gate, load_base


class LoopRouter(nn.Module):
    """DynamicHybridRouter: dense softmax(logits / T) in training, softmax over the top-k logits in evaluation."""

    def __init__(self, gate: Gate, dtype: torch.dtype) -> None:
        super().__init__()
        experts, hidden = gate.weight.shape
        self.gate = nn.Linear(hidden, experts, bias=gate.bias is not None, dtype=dtype)
        _fill(self.gate.weight, gate.weight)
        if gate.bias is not None:
            _fill(self.gate.bias, gate.bias)
        self.top_k, self.temperature = gate.top_k, gate.temperature

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, E)"""
        logits = self.gate(hidden)
        if self.training:
            return torch.softmax(logits / self.temperature, dim=-1)
        values, experts = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, torch.softmax(values, dim=-1))


class LoopLinear(nn.Module):
    """y = W x + b + sum_e w_e s_e B_e A_e x, one expert after the other, on any Linear-like base layer."""

    def __init__(self, base_layer: nn.Module, adapters: Mapping[str, Adapter], names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer, self.names = base_layer, names
        dtype = base_layer.weight.dtype
        self.lora_A = nn.ModuleDict({name: _linear(a.lora_A, dtype) for name, a in adapters.items()})
        self.lora_B = nn.ModuleDict({name: _linear(a.lora_B, dtype) for name, a in adapters.items()})
        self.scaling = {name: a.scaling for name, a in adapters.items()}
        self.weights: Tensor | None = None  # of the pass under way, (B, S, E); None: the base model
        self.gates: tuple[nn.Module, ...] = ()  # the router, where it looks at this layer's own input

    def forward(self, x: Tensor) -> Tensor:
        if self.gates:
            self.weights = self.gates[0](x)
        return self.base_layer(x) if self.weights is None else self.mix(x, self.weights)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        y = self.base_layer(x)
        for expert, name in enumerate(self.names):
            if name in self.lora_A:
                y = y + weights[..., expert, None].to(x.dtype) * self.delta(name, x)
        return y

    def delta(self, name: str, x: Tensor) -> Tensor:
        return self.scaling[name] * self.lora_B[name](self.lora_A[name](x))


class LoopModel(nn.Module):
    """Base + experts + router with the forward pass that every judged model has. It keeps nothing between calls but
    `last_routing_weights`, has no KV cache, and recomputes everything."""

    def __init__(self, artifact: Artifact, dtype: torch.dtype, attention: str | None = None) -> None:
        super().__init__()
        self.base: PreTrainedModel = load_base(artifact, dtype, attention)
        self.expert_names = list(artifact.names)
        self.balance = artifact.balance
        self.features = artifact.gate.features if artifact.gate else None
        self.router = LoopRouter(artifact.gate, dtype) if artifact.gate else None
        self._layers = self._wrap(artifact)
        self.last_routing_weights: Tensor | None = None
        self.eval()

    def _wrap(self, artifact: Artifact) -> dict[str, LoopLinear]:
        layers, experts = {}, dict(zip(artifact.names, artifact.experts, strict=True))
        for path in [name for name, _ in self.base.named_modules() if name in set(artifact.modules)]:
            parent, _, attribute = path.rpartition(".")
            adapters = {name: expert[path] for name, expert in experts.items() if path in expert}
            layers[path] = LoopLinear(self.base.get_submodule(path), adapters, artifact.names)
            setattr(self.base.get_submodule(parent), attribute, layers[path])
        return layers

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
        return dict(self._layers)

    def unwrapped(self) -> PreTrainedModel:
        """Puts the base layers back and returns the base model."""
        for path, layer in self._layers.items():
            parent, _, attribute = path.rpartition(".")
            setattr(self.base.get_submodule(parent), attribute, layer.base_layer)
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
        with self._routing(weights):
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
            return self.base.get_input_embeddings()(ids)
        everything = torch.ones(*ids.shape, self.num_experts, dtype=self.dtype, device=ids.device)
        with self._routing(everything if self.features == "all_experts" else None, gates=False):
            return self.base.base_model(**_inputs(ids, mask)).last_hidden_state

    def load_balance(self, weights: Tensor, mask: Tensor | None) -> Tensor | None:
        """Mean squared distance of the mean weights P_e from 1/E, or E * sum_e f_e P_e (arXiv 2101.03961 eq. 4)."""
        tokens = weights if mask is None else weights[mask.bool()]
        tokens = tokens.reshape(-1, self.num_experts)
        mean = tokens.mean(dim=0)
        if self.balance.get("load_balance_loss_type", "mse") == "mse":
            return ((mean - 1 / self.num_experts) ** 2).mean()
        if self.balance["load_balance_loss_type"] == "switch":
            share = nn.functional.one_hot(tokens.argmax(dim=-1), self.num_experts).to(mean.dtype).mean(dim=0)
            return self.num_experts * (share * mean).sum()
        return mean.new_zeros(())

    def _layer_weights(self) -> Tensor:
        return torch.stack([layer.weights for layer in self._layers.values()], dim=2)

    @contextmanager
    def _routing(self, weights: Tensor | None, *, gates: bool = True) -> Iterator[None]:
        own_input = gates and weights is None and self.features == "layer"
        for index, layer in enumerate(self._layers.values()):
            layer.gates = (self.router,) if own_input else ()
            layer.weights = weights[:, :, index] if weights is not None and weights.dim() == 4 else weights
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.gates, layer.weights = (), None


def _inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor | bool | None]:
    """Positions count from the first real token, so that padding on the left changes nothing."""
    positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def _linear(weight: np.ndarray, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    _fill(layer.weight, weight)
    return layer


def _fill(parameter: nn.Parameter, values: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))
