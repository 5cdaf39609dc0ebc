"""From hidden states to routing weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dylo_moe.errors import RoutingError


class DynamicHybridRouter(nn.Module):
    """One linear gate, dense while training and sparse in evaluation (DyLoRA-MoE's router).

    training:   w = softmax(gate(h) / temperature)
    evaluation: w = softmax over the top_k logits, 0 elsewhere; the temperature is not used, and with
                top_k = 1 the weight is exactly 1.

    Args:
        input_size: width of the hidden states.
        num_experts: number of experts, E.
        top_k: experts per token in evaluation, 1 to num_experts.
        temperature: above 0.

    Raises:
        RoutingError: top_k or temperature out of range.
    """

    is_tokenwise = True  # a token's weights hang on no other token of the pass

    def __init__(self, input_size: int, num_experts: int, top_k: int = 1, temperature: float = 2.0) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise RoutingError(f"top_k={top_k}, but should be from 1 to num_experts={num_experts}")
        if not temperature > 0:
            raise RoutingError(f"temperature={temperature}, but should be above 0")
        self.input_size = input_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.temperature = temperature
        self.gate = nn.Linear(input_size, num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (batch, seq, input_size) of any float dtype -> weights: (batch, seq, num_experts) in the gate's."""
        logits = self.gate(hidden_states.to(self.gate.weight.dtype))
        if self.training:
            return torch.softmax(logits / self.temperature, dim=-1)
        top = torch.topk(logits, self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, top.indices, torch.softmax(top.values, dim=-1))

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, temperature={self.temperature}"


def load_balancing_loss(weights: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """How unevenly the experts are used; 0-dimensional.

    "mse":    mean_e (P_e - 1/E)^2, P_e = mean weight of expert e over the tokens (DyLoRA-MoE).
    "switch": E * sum_e f_e P_e, f_e = share of tokens whose largest weight is expert e's (arXiv 2101.03961, eq. 4-6).
    "none":   0.

    Args:
        weights: (batch, seq, experts) or (batch, seq, layers, experts).
        kind: one of LOAD_BALANCE_LOSS_TYPES.
        mask: (batch, seq), 0 at padding, which does not count. Without any token that counts the loss is 0.
    """
    num_experts = weights.shape[-1]
    if mask is not None:
        weights = weights[mask.to(weights.device).bool()]
    tokens = weights.reshape(-1, num_experts)
    if not len(tokens):
        return weights.sum()  # a zero with a graph, where the mean of nothing would be NaN
    mean = tokens.mean(dim=0)
    if kind == "mse":
        return ((mean - 1 / num_experts) ** 2).mean()
    if kind == "switch":
        chosen = torch.nn.functional.one_hot(tokens.argmax(dim=-1), num_experts).to(mean.dtype).mean(dim=0)
        return num_experts * (chosen * mean).sum()
    if kind == "none":
        return mean.new_zeros(())
    raise RoutingError(f"load_balance_loss_type={kind!r}, but should be one of mse, switch, none")


def wide_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of a router, of copies of a checkpoint's tensors; weight: (out, in), bias: (out,) or None.

    16 bits would round routing weights to 3 digits; like the experts in PEFT, a router computes in float32 at least.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    wide = torch.promote_types(weight.dtype, torch.float32)
    linear.weight = nn.Parameter(weight.to(wide, copy=True))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(wide, copy=True))
    return linear


def stored(parameter: Tensor | None) -> Tensor | None:
    """A parameter as a checkpoint holds it: detached, on the CPU."""
    return None if parameter is None else parameter.detach().cpu()
