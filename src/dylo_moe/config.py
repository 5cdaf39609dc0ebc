"""MoELoraConfig: a LoRA configuration that also says how its experts are routed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft import LoraConfig

from dylo_moe.formats.checkpoint import ROUTER_FEATURES

ROUTER_TYPES = ("dynamic_hybrid", "xlora", "gates")
ROUTING_LEVELS = ("linear", "feed_forward")
LOAD_BALANCE_LOSS_TYPES = ("mse", "switch", "none")


@dataclass
class MoELoraConfig(LoraConfig):
    """PEFT's `LoraConfig` plus routing. `save_pretrained` and `from_pretrained` round-trip every field.

    Args:
        use_moe_routing: False turns the adapters into plain LoRA.
        num_experts: number of experts, at least 1.
        top_k_experts: experts per token in evaluation, 1 to num_experts; training is always dense.
        router_hidden_size: width of the router's input; None takes the base model's hidden size.
        router_aux_loss_coef: weight of the load-balancing loss in `loss`, at least 0.
        router_temperature: divides the gate's logits in training, above 0.
        router_type: "dynamic_hybrid" (the DynamicHybridRouter), "xlora" (X-LoRA's classifier) or "gates" (one per layer).
        load_balance_loss_type: "mse" (mean squared distance of the mean weights from 1/E, as DyLoRA-MoE),
            "switch" (E * sum_e fraction_e * mean_weight_e, arXiv 2101.03961 eq. 4) or "none".
        router_features: what the router sees: "base" (last hidden state with the adapters off), "all_experts"
            (the same with every adapter on), "embedding", or "layer" (the routed layer's own input).
        shared_adapter: name of an adapter that is no expert: always added, with weight 1.
        routing_level: what is mixed: "linear", each Linear's deltas, or "feed_forward", the outputs of whole MLPs (MixLoRA).

    Raises:
        ValueError: a value is out of range; the message names the field, what was found and what is allowed.
    """

    use_moe_routing: bool = field(default=True)
    num_experts: int = field(default=1)
    top_k_experts: int = field(default=1)
    router_hidden_size: int | None = field(default=None)
    router_aux_loss_coef: float = field(default=0.01)
    router_temperature: float = field(default=2.0)
    router_type: str = field(default="dynamic_hybrid")
    load_balance_loss_type: str = field(default="mse")
    router_features: str = field(default="base")
    shared_adapter: str | None = field(default=None)
    routing_level: str = field(default="linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(_is_int(self.num_experts, 1), "num_experts", self.num_experts, "an integer of at least 1")
        _require(
            _is_int(self.top_k_experts, 1) and self.top_k_experts <= self.num_experts,
            "top_k_experts",
            self.top_k_experts,
            f"an integer from 1 to num_experts={self.num_experts}",
        )
        hidden = self.router_hidden_size
        _require(hidden is None or _is_int(hidden, 1), "router_hidden_size", hidden, "None or an integer of at least 1")
        coefficient, temperature = self.router_aux_loss_coef, self.router_temperature
        _require(_is_number(coefficient) and coefficient >= 0, "router_aux_loss_coef", coefficient, "a number >= 0")
        _require(_is_number(temperature) and temperature > 0, "router_temperature", temperature, "a number above 0")
        shared = self.shared_adapter
        _require(shared is None or isinstance(shared, str), "shared_adapter", shared, "None or an adapter's name")
        _require_one_of("router_type", self.router_type, ROUTER_TYPES)
        _require_one_of("load_balance_loss_type", self.load_balance_loss_type, LOAD_BALANCE_LOSS_TYPES)
        _require_one_of("router_features", self.router_features, ROUTER_FEATURES)
        _require_one_of("routing_level", self.routing_level, ROUTING_LEVELS)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> MoELoraConfig:
        """PEFT resolves "LORA" to LoraConfig, which would drop the routing fields; here the class itself is meant.

        Raises:
            ValueError: a field that this class does not have.
        """
        known = {f.name for f in fields(cls) if f.init}
        unknown = sorted(set(kwargs) - known - {"peft_type"})
        if unknown:
            raise ValueError(f"MoELoraConfig: unknown fields {unknown}; known fields are {sorted(known)}")
        return cls(**{name: value for name, value in kwargs.items() if name in known and name != "peft_type"})

    def lora_config(self) -> LoraConfig:
        """The plain LoraConfig of one expert, without the routing fields, as stock PEFT understands it."""
        routing = {f.name for f in fields(self)} - {f.name for f in fields(LoraConfig)}
        values = {name: value for name, value in asdict(self).items() if name not in routing}
        init = {f.name for f in fields(LoraConfig) if f.init} - {"peft_type"}
        return LoraConfig(**{name: value for name, value in values.items() if name in init})


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, found: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"MoELoraConfig: {name}={found!r}, but should be {allowed}")


def _require_one_of(name: str, found: object, allowed: tuple[str, ...]) -> None:
    _require(found in allowed, name, found, f"one of {', '.join(allowed)}")
