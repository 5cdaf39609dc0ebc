"""What an expert has in a version of its own, mixed as the deltas are: whole modules (modules_to_save) and biases (bias).

    y = M(x; theta) + sum_e w_e (M(x; theta_e) - M(x; theta))

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.errors import RoutingError, ShapeMismatch
from dylo_moe.mixture import Mixture
from dylo_moe.routed import RoutedLinear

_WITH_BIAS = (nn.Linear, Conv1D, nn.LayerNorm)
_CHILD = "expert_bias"


class RoutedModule(ModulesToSaveWrapper):
    """PEFT's wrapper of a module and its experts' versions of it, whose outputs are mixed per token.

    As RoutedLinear, it is the wrapper with another forward. Adapters off: the original; one expert: its version, as in PEFT.
    """

    def __init__(self, wrapper: ModulesToSaveWrapper, mixture: Mixture, *, is_readout: bool = False) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(wrapper.__dict__)
        self.source = (wrapper,)  # a tuple, so that it is not registered as a child
        self.mixture = mixture
        self.is_readout = is_readout

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: token ids (B, S) or hidden states (B, S, in) -> (B, S, out)."""
        route = self.mixture.route
        if route is None or self.disable_adapters:
            return self.original_module(x, *args, **kwargs)
        if isinstance(route, int):
            return self._version(self.mixture.expert_names[route])(x, *args, **kwargs)
        result = self.original_module(x, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise RoutingError(f"experts have their own {type(self.original_module).__name__}, whose output is not a tensor")
        weights = self.mixture.weights_at(route, x.shape[1], is_readout=self.is_readout).to(result.device)
        experts = [(e, name) for e, name in enumerate(self.mixture.expert_names) if name in self.modules_to_save]
        rest = 1 - sum(weights[..., e : e + 1] for e, _ in experts)
        mixed = rest * result
        for e, name in experts:
            mixed = mixed + weights[..., e : e + 1] * self.modules_to_save[name](x, *args, **kwargs)
        return mixed.to(result.dtype)

    def expert_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The expert's version of the module's parameters."""
        if name in self.modules_to_save:
            yield from self.modules_to_save[name].parameters()

    def _version(self, name: str) -> nn.Module:
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module


class ExpertBias(nn.Module):
    """The experts' versions of one bias, added to the output of the module that has it; a child and a hook of that module.

    PEFT keeps no original of a bias that it trains, so a PeftModel can hold the biases of one adapter only. Here the base
    keeps its own.
    """

    def __init__(self, owner: nn.Module, biases: Mapping[str, Tensor], switch: RoutedLinear, *, is_readout: bool) -> None:
        super().__init__()
        bias = owner.bias
        self.versions = nn.ParameterDict(
            {name: nn.Parameter(tensor.to(bias.device, bias.dtype, copy=True)) for name, tensor in biases.items()}
        )
        self.switch = (switch,)  # knows the route, and whether PEFT has switched the adapters off
        self.is_readout = is_readout
        owner.add_module(_CHILD, self)
        self._handle = owner.register_forward_hook(self._add)

    def expert_parameters(self, name: str) -> Iterator[nn.Parameter]:
        if name in self.versions:
            yield self.versions[name]

    def _add(self, owner: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.added(output, owner.bias)

    def added(self, output: Tensor, bias: Tensor) -> Tensor:
        """The owner's output (B, S, out) with its own bias -> the same with the biases that the route asks for."""
        mixture, names = self.switch[0].mixture, list(self.versions)
        route = mixture.route
        if route is None or self.switch[0].disable_adapters:
            return output
        if isinstance(route, int):
            name = mixture.expert_names[route]
            return output + (self.versions[name] - bias) if name in self.versions else output
        weights = mixture.weights_at(route, output.shape[1], is_readout=self.is_readout).to(output.device)
        columns = [mixture.expert_names.index(name) for name in names]
        changes = torch.stack([self.versions[name] - bias for name in names])
        return (output + weights[..., columns].to(changes.dtype) @ changes).to(output.dtype)


def saved_modules(causal_lm: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """PEFT's wrappers of modules_to_save, by their path.

    Raises:
        RoutingError: adapters inside of such a module, which would be there once for each version.
    """
    found = {name: module for name, module in causal_lm.named_modules() if type(module) is ModulesToSaveWrapper}
    for name, wrapper in found.items():
        if any(isinstance(module, BaseTunerLayer) for module in wrapper.modules()):
            raise RoutingError(f"{name} is in modules_to_save and has adapters inside, which cannot be mixed")
    return found


def check_versions(versions: Mapping[str, ModulesToSaveWrapper], mixture: Mixture, features: str) -> None:
    """Raises RoutingError where per-layer gates, or an adapter that is always added, cannot say how to weigh a module."""
    for path, wrapper in versions.items():
        if features == "layer":
            raise RoutingError(f"experts have their own {path}, for which a router per layer has no weights")
        if mixture.shared in wrapper.modules_to_save:
            raise RoutingError(f"the shared adapter {mixture.shared} has its own {path}, which cannot be added to the experts'")


def has_biases(causal_lm: nn.Module) -> bool:
    return any(isinstance(module, ExpertBias) for module in causal_lm.modules())


def add_biases(causal_lm: nn.Module, biases: Mapping[str, Mapping[str, Tensor]], features: str) -> None:
    """Gives the experts of a routed model biases of their own. biases: expert -> path of the module -> bias.

    features: what the router sees.

    Raises:
        ShapeMismatch: a module that the base does not have, that has no bias, or one of another size.
        RoutingError: a module that does more with its bias than adding it at the end, or a router per layer.
    """
    if features == "layer" and any(biases.values()):
        raise RoutingError("experts have biases of their own, for which a router per layer has no weights")
    switch = next(module for module in causal_lm.modules() if isinstance(module, RoutedLinear))
    readout = causal_lm.get_output_embeddings()
    modules = dict(causal_lm.named_modules())
    by_path: dict[str, dict[str, Tensor]] = {}
    for expert, own in biases.items():
        for path, bias in own.items():
            by_path.setdefault(path, {})[expert] = bias
    for path, versions in by_path.items():
        module = modules.get(path)
        owner = module.get_base_layer() if isinstance(module, RoutedLinear) else module
        _check_owner(owner, path, versions, is_adapted=isinstance(module, RoutedLinear))
        ExpertBias(owner, versions, switch, is_readout=module is readout)


def _check_owner(owner: nn.Module | None, path: str, versions: Mapping[str, Tensor], *, is_adapted: bool) -> None:
    bias = getattr(owner, "bias", None)
    for expert, version in versions.items():
        if not isinstance(bias, Tensor) or version.shape != bias.shape:
            expected = f"shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else "no bias: the base model has none here"
            raise ShapeMismatch(path, f"{expert}: bias", found=f"shape {tuple(version.shape)}", expected=expected)
    if not is_adapted and not isinstance(owner, _WITH_BIAS):
        raise RoutingError(f"experts have their own bias of {path}, a {type(owner).__name__}, which cannot be mixed")
