"""FFN mixing (MixLoRA, arXiv 2404.15159): y = sum_e w_e FFN_e(x), where FFN_e is the base's MLP with LoRA expert e inside.

MoE-PEFT's mixlora-switch hands the input of some tokens on instead; see GatesState.mixlora_switch.
Not a sum of deltas per Linear: the MLP is not linear. Shapes: B batch, S sequence, E experts, T = B * S tokens.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dylo_moe.errors import RoutingError
from dylo_moe.mixture import Mixture
from dylo_moe.routed import RoutedLinear

_BARE = frozenset(vars(nn.Module()))
_NO_ACTIVATION = (nn.Dropout, nn.Identity, nn.Linear)


class RoutedFeedForward(nn.Module):
    """Takes an MLP's place: each expert runs the whole MLP, and only for the tokens that use it.

    Children, parameters and hooks are the MLP's own objects under their own names; `source` can be put back untouched.
    The RoutedLinears inside run with one expert at a time as their route, so they have no gate and no index of their own.

    Args:
        mlp: (B, S, hidden) -> (B, S, hidden), its LoRA layers routed already.
        mixture: shared with the other routed layers.
        index: its place in per-layer weights.

    Raises:
        RoutingError: the module does not take exactly one input.
    """

    def __init__(self, mlp: nn.Module, mixture: Mixture, index: int) -> None:
        super().__init__()
        if len(inspect.signature(mlp.forward).parameters) != 1:
            raise RoutingError(f"a {type(mlp).__name__} cannot be mixed as a whole: it takes more than one input")
        self.__dict__.update({name: value for name, value in vars(mlp).items() if name in _BARE})
        self.source = (mlp,)  # a tuple, so that it is not registered as a child
        self.layers = tuple(module for module in mlp.modules() if isinstance(module, RoutedLinear))
        self.mixture = mixture
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, hidden) -> (B, S, hidden), mixed as the model's Mixture says."""
        route = self.mixture.route
        if route is None or isinstance(route, int) or any(layer.disable_adapters for layer in self.layers):
            return self.source[0].forward(x)
        if isinstance(route, Tensor):
            weights = route[:, :, self.index] if route.dim() == 4 else route
            return self.mix(x, weights, skip_unused=not weights.requires_grad)
        gate = route[self.index] if isinstance(route, nn.ModuleList) else route
        weights = self.mixture.layer_weights[self.index] = gate(x)
        switch = getattr(gate, "mixlora_switch", None)
        if switch == "inference":
            return x
        if switch == "training":
            return self._mix_or_hand_on(x, weights, gate.within_capacity(weights, self.mixture.tokens).to(x.device))
        return self.mix(x, weights)

    def _mix_or_hand_on(self, x: Tensor, weights: Tensor, runs: Tensor) -> Tensor:
        """mixlora-switch as in training. x: (B, S, hidden); runs: (B, S, 1), whose expert runs; other inputs are handed on."""
        weights = weights.to(x.device)
        handed_on = (weights.sum(dim=-1, keepdim=True) * x).masked_fill(runs, 0.0)
        return (self.mix(x, weights * runs) + handed_on).to(x.dtype)

    def mix(self, x: Tensor, weights: Tensor, *, skip_unused: bool = True) -> Tensor:
        """x: (B, S, hidden); weights: (B|1, S|1, E), which need not sum to 1 -> (B, S, hidden).

        skip_unused: leaves out tokens of weight 0. They add nothing, but given weights learn from them.
        """
        weights = weights.expand(*x.shape[:2], -1).flatten(0, 1)  # (T, E)
        weights = weights.to(x.device, torch.promote_types(weights.dtype, torch.float32))
        tokens = x.flatten(0, 1)
        mixed = torch.zeros_like(tokens, dtype=torch.promote_types(x.dtype, weights.dtype))
        for expert in range(self.mixture.num_experts):
            column = weights[:, expert]
            rows = column.nonzero().flatten() if skip_unused else torch.arange(len(tokens), device=x.device)
            if len(rows):
                with self.mixture.using(expert):
                    states = self.source[0].forward(tokens[None, rows])[0]
                mixed.index_add_(0, rows, (states * column[rows, None]).to(mixed.dtype))
        return mixed.view(x.shape).to(x.dtype)

    def train(self, mode: bool = True) -> RoutedFeedForward:
        self.source[0].training = mode
        return super().train(mode)


def has_activation(mlp: nn.Module, name: str) -> bool:
    """Whether the MLP's activation is transformers' function of that name: the same values, whatever its class is called."""
    if name not in ACT2FN:
        return False
    x = torch.linspace(-6, 6, 97)
    own = [m for m in mlp.children() if not isinstance(m, _NO_ACTIVATION) and not list(m.parameters())]
    return all(torch.allclose(activation(x), ACT2FN[name](x), rtol=0, atol=1e-5) for activation in own)
