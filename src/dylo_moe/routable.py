"""Which layers of a PeftModel are routed, putting the routed layers in their place, and back."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from dylo_moe.errors import RoutingError
from dylo_moe.feed_forward import RoutedFeedForward
from dylo_moe.mixture import Mixture
from dylo_moe.replaced import RoutedModule, saved_modules
from dylo_moe.routed import RoutedLinear
from dylo_moe.siblings import siblings

# PEFT's LoRA layers on quantised Linears; named, since importing them needs the packages that quantise.
_ON_QUANTISED = (
    *("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "HqqLoraLinear"),
    *("GPTQLoraLinear", "AwqLoraLinear", "EetqLoraLinear", "AqlmLoraLinear"),
)
# PEFT's variants that look at one position at a time and leave the base as it is. MiCA differs in its training only.
ONE_BY_ONE = ("DoraLinearVariant", "MiCALinearVariant")


def routable_layers(causal_lm: PreTrainedModel) -> dict[str, LoraLinear]:
    """The LoRA layers in module order, by their path in the base model.

    Raises:
        RoutingError: no LoRA layer, a layer that is routed already, or one that cannot be mixed.
    """
    layers = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, (RoutedLinear, RoutedModule)):
            raise RoutingError(f"{name} is routed already; call detach_router first")
        if isinstance(module, AuxiliaryTrainingWrapper) and type(module) is not ModulesToSaveWrapper:
            raise RoutingError(f"{name} was trained beside the LoRA ({type(module).__name__}), which cannot be mixed")
        if not isinstance(module, BaseTunerLayer):
            continue
        variants = {type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()}
        if not _is_lora_of_linear(module) or not variants <= set(ONE_BY_ONE):
            kind = f"{type(module).__module__}.{type(module).__name__} {', '.join(sorted(variants))}".strip()
            raise RoutingError(f"{name} is a {kind}, but should be a LoRA or DoRA on a Linear or Conv1D, quantised or not")
        layers[name] = module
    _check_offloaded(causal_lm, layers)
    if not layers:
        raise RoutingError("the model has no LoRA layer to route")
    return layers


def _check_offloaded(causal_lm: PreTrainedModel, layers: dict[str, LoraLinear]) -> None:
    """A model that is on the device meta as a whole has yet to get its weights; parts that are there were offloaded."""
    if all(parameter.is_meta for parameter in causal_lm.parameters()):
        return
    for name, layer in layers.items():
        if any(part[adapter].weight.is_meta for part in (layer.lora_A, layer.lora_B) for adapter in part):
            raise RoutingError(f"{name}: experts are offloaded (on the device meta), but should stay on a device; see device_map")


def _is_lora_of_linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind is LoraLinear or (kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in _ON_QUANTISED)


def notes_on(layers: dict[str, LoraLinear], versions: Iterable[str]) -> tuple[str, ...]:
    """What a user should know about how these layers and the modules that experts have in their own versions are mixed."""
    names = sorted({name for layer in layers.values() for name in layer.lora_variant})
    notes = []
    if names:
        how = "they are not sums of deltas and run one by one, as x -> f_e(x) - f(x) weighted in each layer"
        notes.append(f"{', '.join(names)[:200]}: DoRA experts; {how}")
    if versions:
        how = "each version runs, and their outputs are weighted"
        notes.append(f"{', '.join(versions)[:200]}: experts have their own versions of these modules; {how}")
    return tuple(notes)


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
    _introduce_siblings(causal_lm, layers)
    for name, wrapper in saved_modules(causal_lm).items():
        _replace(causal_lm, name, RoutedModule(wrapper, mixture, is_readout=wrapper is readout))
    for name in places.keys() - layers.keys():
        _replace(causal_lm, name, RoutedFeedForward(causal_lm.get_submodule(name), mixture, places[name]))


def _introduce_siblings(causal_lm: PreTrainedModel, layers: Iterable[str]) -> None:
    """Only in modules of transformers, which are known not to write into what their Linears read."""
    for paths in siblings(list(layers)):
        parent = causal_lm.get_submodule(paths[0].rpartition(".")[0])
        if type(parent).__module__.startswith("transformers."):
            group = [causal_lm.get_submodule(path) for path in paths]
            for place, layer in enumerate(group):
                layer.siblings = tuple(group[place + 1 :])


def restore_layers(causal_lm: PreTrainedModel) -> None:
    """Puts the layers that `route_layers` took away back in their place."""
    for name, layer in [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, (RoutedLinear, RoutedModule))]:
        original = layer.source[0]
        # Flags that PEFT's methods have set on the routed layer since: training, active adapter, adapters disabled.
        original.__dict__.update({key: layer.__dict__[key] for key in original.__dict__ if key in layer.__dict__})
        _replace(causal_lm, name, original)
    for name, block in [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, RoutedFeedForward)]:
        _replace(causal_lm, name, block.source[0])


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
