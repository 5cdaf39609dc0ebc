"""Modules of which experts have versions of their own (PEFT's modules_to_save and bias), in the naive loop.

B rows, S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class LoopVersions(nn.Module):
    """y = M(x; theta) + sum_e w_e (M(x; theta_e) - M(x; theta)): a module of which experts have versions of their own.

    versions: expert -> those parameters of theta_e that are its own.
    """

    def __init__(self, module: nn.Module, versions: Mapping[int, Mapping[str, np.ndarray]], dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.experts = list(versions)
        own = ({name: parameter(values, dtype) for name, values in held.items()} for held in versions.values())
        self.versions = nn.ModuleList(_Parameters(held) for held in own)
        self.is_off = False
        self.weights: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y if self.is_off else self.mix(x, y, self.weights)

    def mix(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        mixed = y
        for expert, version in zip(self.experts, self.versions, strict=True):
            mixed = mixed + weights[..., expert, None].to(y.dtype) * (self.version(version, x) - y)
        return mixed

    def version(self, own: _Parameters, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, own.by_name(), (x,))


class _Parameters(nn.Module):
    """Parameters whose names have dots."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.held = nn.ParameterList(parameters.values())

    def by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.held, strict=True))


def plain(module: nn.Module) -> nn.Module:
    """The base model's own module."""
    return module.module if isinstance(module, LoopVersions) else module


def parameter(values: np.ndarray, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(values)).to(dtype), requires_grad=False)
