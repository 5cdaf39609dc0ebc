"""One plain LoRA in the place of a mixture, for fixed weights: exactly their sum, because ranks are stacked and not reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dylo_moe.errors import ConversionError, OptionError
from dylo_moe.formats import Checkpoint, Expert, GatesState, LoraPair

NAME = "merged"


def merge(checkpoint: Checkpoint, weights: Sequence[float]) -> Checkpoint:
    """The checkpoint with one expert, whose delta is sum_e weights[e] * delta_e, and no router.

    As PEFT's add_weighted_adapter(combination_type="cat"): A is the experts' (w_e s_e A_e) on top of one another, B their B_e
    side by side, the scaling is 1, the rank the sum of the ranks. Products of 16-bit tensors are kept in float32. An adapter
    that is always added is one more part, with weight 1. Experts of weight 0 are left out; one expert of weight 1 alone stays
    as it is.

    Args:
        weights: one per expert; they take the place of what the router computes, its own factors included.

    Raises:
        OptionError: another number of weights, one that is not finite, or all 0.
        ConversionError: experts that are not a sum of deltas per Linear.
    """
    _check(weights, checkpoint.num_experts)
    parts = [(weight, expert) for weight, expert in zip(weights, checkpoint.experts, strict=True) if weight != 0]
    if len(parts) == 1 and parts[0][0] == 1 and checkpoint.shared is None:
        return replace(checkpoint, experts=(replace(parts[0][1], name=NAME),), router=None)
    if isinstance(checkpoint.router, GatesState) and checkpoint.router.level == "feed_forward":
        raise ConversionError(f"{checkpoint.path}: cannot be merged: it mixes outputs of whole MLPs, not deltas of their Linears")
    parts += [] if checkpoint.shared is None else [(1.0, checkpoint.shared)]
    for _, expert in parts:
        _check_sum_of_deltas(checkpoint, expert)
    modules = dict.fromkeys(module for _, expert in parts for module in expert.modules)
    pairs = {module: _stack([(w, e.modules[module]) for w, e in parts if module in e.modules]) for module in modules}
    return replace(checkpoint, experts=(Expert(NAME, pairs),), router=None, shared=None)


def _check(weights: Sequence[float], count: int) -> None:
    listed = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise OptionError(f"merge={listed}, but should be {count} weights, one per expert")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise OptionError(f"merge={listed}, but should be finite numbers, not all 0")


def _check_sum_of_deltas(checkpoint: Checkpoint, expert: Expert) -> None:
    dora = any(pair.magnitude is not None or pair.bias is not None for pair in expert.modules.values())
    if dora or expert.replaced or expert.biases:
        reason = f"{expert.name} has more than LoRA pairs (DoRA, biases or modules of its own), which no sum of pairs gives"
        raise ConversionError(f"{checkpoint.path}: cannot be merged: {reason}")


def _stack(parts: list[tuple[float, LoraPair]]) -> LoraPair:
    lora_A = torch.cat([_wide(pair.lora_A) * weight * pair.scaling for weight, pair in parts])
    lora_B = torch.cat([_wide(pair.lora_B) for _, pair in parts], dim=1)
    return LoraPair(lora_A, lora_B, alpha=float(lora_A.shape[0]))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
