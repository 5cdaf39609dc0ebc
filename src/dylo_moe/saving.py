"""From a routed model to what a checkpoint holds of it: experts, shared adapter and router, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dylo_moe.errors import RoutingError
from dylo_moe.formats import Expert, GatesState, LoraPair, Router, RouterState
from dylo_moe.gates import LayerGate
from dylo_moe.replaced import ExpertBias, RoutedModule
from dylo_moe.routed import RoutedLinear
from dylo_moe.router import DynamicHybridRouter


def stored_expert(name: str, causal_lm: nn.Module) -> Expert:
    """One adapter of a routed model, with what it has in versions of its own, by paths in the base model."""
    pairs: dict[str, LoraPair] = {}
    replaced: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for path, module in causal_lm.named_modules():
        if isinstance(module, RoutedLinear) and name in module.lora_A:
            pairs[path] = _stored_pair(name, module)
        elif isinstance(module, RoutedModule) and name in module.modules_to_save:
            own = module.modules_to_save[name].state_dict()
            replaced[path] = {key: tensor.detach().cpu() for key, tensor in own.items()}
        elif isinstance(module, ExpertBias) and name in module.versions:
            owner = path.rpartition(".")[0].removesuffix(".base_layer")
            biases[owner] = module.versions[name].detach().cpu()
    return Expert(name=name, modules=pairs, replaced=replaced, biases=biases)


def _stored_pair(name: str, layer: RoutedLinear) -> LoraPair:
    lora_A, lora_B = layer.lora_A[name].weight.detach().cpu(), layer.lora_B[name]
    root = lora_A.shape[0] ** 0.5 if layer.use_rslora[name] else lora_A.shape[0]
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
    return LoraPair(
        lora_A=lora_A,
        lora_B=lora_B.weight.detach().cpu(),
        alpha=_exact_alpha(layer.scaling[name], root, layer.lora_alpha[name]),
        use_rslora=bool(layer.use_rslora[name]),
        magnitude=None if magnitude is None else magnitude.detach().cpu(),
        bias=None if lora_B.bias is None else lora_B.bias.detach().cpu(),
    )


def _exact_alpha(scaling: float, root: float, configured: float) -> float:
    # set_scale may have changed the scaling since the configuration was made.
    return configured if configured / root == scaling else scaling * root


def stored_router(router: nn.Module | None, units: Sequence[str], features: str, level: str = "linear") -> Router | None:
    """The router with its tensors as they are now.

    Args:
        units: paths of what is routed, in the order of the gates.
        level: what the units are, see GatesState.

    Raises:
        RoutingError: a module of another kind, which no checkpoint can describe.
    """
    if router is None:
        return None
    if isinstance(router, DynamicHybridRouter):
        weight, bias = router.gate.weight.detach().cpu(), router.gate.bias.detach().cpu()
        return RouterState(weight, bias, features, router.top_k, router.temperature)
    if isinstance(router, nn.ModuleList) and all(isinstance(gate, LayerGate) for gate in router):
        return _stored_gates(list(router), units, level)
    if hasattr(router, "state"):  # an X-LoRA classifier
        return router.state()
    raise RoutingError(f"a {type(router).__name__} cannot be saved: no checkpoint can describe it")


def _stored_gates(gates: list[LayerGate], units: Sequence[str], level: str) -> GatesState:
    first = gates[0]
    for name in ("rule", "temperature", "threshold", "num_experts", "mixlora_switch", "expert_capacity"):
        if len({getattr(gate, name) for gate in gates}) != 1:
            raise RoutingError(f"gates that differ in their {name} cannot be saved")
    return GatesState(
        gates={unit: gate.state() for unit, gate in zip(units, gates, strict=True)},
        rule=first.rule,
        num_experts=first.num_experts,
        level=level,
        temperature=first.temperature,
        threshold=first.threshold,
        activation=first.activation,
        mixlora_switch=first.mixlora_switch,
        expert_capacity=first.expert_capacity,
    )
