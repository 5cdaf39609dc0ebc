"""Which layers of a PeftModel are routed, putting the routed layers in their place, and back."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from dylo_moe.errors import RoutingError
from dylo_moe.feed_forward import RoutedFeedForward
from dylo_moe.routed import Mixture, RoutedLinear


def routable_layers(causal_lm: PreTrainedModel) -> dict[str, LoraLinear]:
    """The LoRA layers in module order, by their path in the base model.

    Raises:
        RoutingError: no LoRA layer, a layer that is routed already, or one that cannot be mixed.
    """
    layers = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, RoutedLinear):
            raise RoutingError(f"{name} is routed already; call detach_router first")
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise RoutingError(f"{name} was trained beside the LoRA ({type(module).__name__}), which cannot be mixed")
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not LoraLinear or module.lora_variant or any(module.lora_bias.values()):
            variant = ", ".join(sorted(type(v).__name__ for v in getattr(module, "lora_variant", {}).values()))
            kind = f"{type(module).__module__}.{type(module).__name__} {variant}".strip()
            raise RoutingError(f"{name} is a {kind}, but should be a plain LoRA on a Linear or Conv1D")
        layers[name] = module
    if not layers:
        raise RoutingError("the model has no LoRA layer to route")
    return layers


def routed_units(
    causal_lm: PreTrainedModel, layers: dict[str, LoraLinear], mixture: Mixture, level: str = "linear"
) -> dict[str, int]:
    """Path -> input width of what is routed, in module order: each has its own place in per-layer weights.

    level: "linear", the layers that some expert adapts (the others have the shared adapter only); "feed_forward", the MLPs
    in which these layers lie.
    """
    adapted = {name: m.in_features for name, m in layers.items() if any(e in m.lora_A for e in mixture.expert_names)}
    if level == "linear":
        return adapted
    hidden_size = causal_lm.get_input_embeddings().weight.shape[1]
    return {name.rpartition(".")[0]: hidden_size for name in adapted}


def route_layers(causal_lm: PreTrainedModel, layers: dict[str, LoraLinear], mixture: Mixture, units: Iterable[str]) -> None:
    """Puts a RoutedLinear in the place of each layer, then a RoutedFeedForward in the place of each unit that is an MLP."""
    readout = causal_lm.get_output_embeddings()
    places = {name: index for index, name in enumerate(units)}
    mixture.num_layers = len(places)
    for name, layer in layers.items():
        _replace(causal_lm, name, RoutedLinear(layer, mixture, places.get(name), is_readout=layer is readout))
    for name in places.keys() - layers.keys():
        _replace(causal_lm, name, RoutedFeedForward(causal_lm.get_submodule(name), mixture, places[name]))


def restore_layers(causal_lm: PreTrainedModel) -> None:
    """Puts the layers that `route_layers` took away back in their place."""
    for name, layer in [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, RoutedLinear)]:
        original = layer.source[0]
        # Flags that PEFT's methods have set on the routed layer since: training, active adapter, adapters disabled.
        original.__dict__.update({key: layer.__dict__[key] for key in original.__dict__ if key in layer.__dict__})
        _replace(causal_lm, name, original)
    for name, block in [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, RoutedFeedForward)]:
        _replace(causal_lm, name, block.source[0])


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
