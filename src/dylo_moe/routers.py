"""From the router that a checkpoint holds to the module that routes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dylo_moe.config import MoELoraConfig
from dylo_moe.errors import InvalidField, ShapeMismatch
from dylo_moe.feed_forward import has_activation
from dylo_moe.formats import Checkpoint, GatesState, RouterState, XLoraState
from dylo_moe.gates import LayerGate
from dylo_moe.router import DynamicHybridRouter, wide_linear
from dylo_moe.xlora_router import XLoraRouter


def build_router(checkpoint: Checkpoint, causal_lm: PreTrainedModel) -> nn.Module | None:
    """The router, with the checkpoint's tensors; 16-bit ones become float32, as the experts do in PEFT.

    Raises:
        ShapeMismatch: a gate on a module that the base model does not have.
        InvalidField: the base model's MLPs have another activation than the checkpoint was trained with.
    """
    state = checkpoint.router
    if isinstance(state, GatesState):
        return _gates(checkpoint, state, causal_lm)
    if isinstance(state, XLoraState):
        return XLoraRouter(state)
    if state is None:
        return None
    router = DynamicHybridRouter(state.hidden_size, state.num_experts, state.top_k, state.temperature)
    router.gate = wide_linear(state.weight, state.bias)
    return router


def _gates(checkpoint: Checkpoint, state: GatesState, causal_lm: PreTrainedModel) -> nn.ModuleList:
    """One gate per routed unit, in the base model's own order of modules."""
    names = [name for name, _ in causal_lm.named_modules() if name in state.gates]
    lost = [name for name in state.gates if name not in names]
    if lost:
        found = f"a gate on {lost[0]}, which the base model does not have"
        raise ShapeMismatch(checkpoint.path, lost[0], found=found, expected="gates of this base model")
    for name in names:
        if state.activation is not None and not has_activation(causal_lm.get_submodule(name), state.activation):
            found = f"{state.activation[:80]!r}, which is not the activation of the base model's {name}"
            raise InvalidField(checkpoint.path, "act_fn", found=found, expected="the base model's own")
    return nn.ModuleList(LayerGate(state.gates[name], state) for name in names)


def build_config(checkpoint: Checkpoint) -> MoELoraConfig:
    """How the model routes, from what the checkpoint records."""
    state = checkpoint.router
    values: dict[str, Any] = {}
    if isinstance(state, RouterState):
        values = {
            "top_k_experts": state.top_k,
            "router_hidden_size": state.hidden_size,
            "router_temperature": state.temperature,
        }
    elif isinstance(state, XLoraState):
        values = {
            "router_type": "xlora",
            "top_k_experts": state.top_k or state.num_experts,
            "router_hidden_size": state.hidden_size,
            "router_temperature": state.softmax_temperature,
        }
    elif isinstance(state, GatesState):
        values = {"router_type": "gates", "routing_level": state.level}
    if state is not None:
        values["router_features"] = state.features
    if state is not None and not isinstance(state, RouterState):
        values["load_balance_loss_type"] = "none"  # the default is DyLoRA-MoE's loss, with which nobody else trains
    shared = checkpoint.shared.name if checkpoint.shared is not None else None
    return MoELoraConfig(num_experts=checkpoint.num_experts, shared_adapter=shared, **values | dict(checkpoint.load_balance))
