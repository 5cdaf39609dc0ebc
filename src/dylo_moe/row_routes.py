"""A batch in which the router decides some rows, and every other row has an expert of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class RowRoutes:
    """Which rows the router decides, and the others' experts.

    Args:
        experts: for each row its expert, or None where the router decides; at least one of each kind.
        num_experts: of the model.
        device: of the model.
    """

    def __init__(self, experts: Sequence[int | None], num_experts: int, device: torch.device) -> None:
        self.rows = len(experts)
        fixed = [row for row, expert in enumerate(experts) if expert is not None]
        self.routed = torch.tensor([row for row, expert in enumerate(experts) if expert is None], device=device)
        self.fixed = torch.tensor(fixed, device=device)
        ids = torch.tensor([experts[row] for row in fixed], device=device)
        self.one_hot = nn.functional.one_hot(ids, num_experts).to(torch.float32)
        self._gates: tuple[nn.Module, nn.Module] | None = None

    def of_routed_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a forward pass over the router's rows alone."""
        return {k: v.index_select(0, self.routed) if k in _BY_ROW and v is not None else v for k, v in inputs.items()}

    def fill(self, weights: Tensor) -> Tensor:
        """The routed rows' weights (routed, S, E) or (routed, S, L, E) among the other rows' one-hot ones, (rows, S, ..., E)."""
        full = weights.new_empty(self.rows, *weights.shape[1:])
        full[self.routed] = weights
        shape = (len(self.fixed), *[1] * (weights.dim() - 2), weights.shape[-1])
        full[self.fixed] = self.one_hot.to(weights.dtype).view(shape).expand(-1, *weights.shape[1:])
        return full

    def gates(self, router: nn.Module) -> nn.Module:
        """The router of each layer's own input, for these rows; made once."""
        if self._gates is None or self._gates[0] is not router:
            many = isinstance(router, nn.ModuleList)
            mine = nn.ModuleList([RowGate(gate, self) for gate in router]) if many else RowGate(router, self)
            self._gates = (router, mine)
        return self._gates[1]


class RowGate(nn.Module):
    """A gate that decides its rows and lets the others have their experts."""

    def __init__(self, gate: nn.Module, routes: RowRoutes) -> None:
        super().__init__()
        self.gate = gate
        self.routes = routes

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, S, I) -> weights (rows, S, E)."""
        return self.routes.fill(self.gate(x.index_select(0, self.routes.routed)))
