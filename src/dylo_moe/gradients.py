"""The dense sum with a graph: forward and backward written out, so that a training step keeps little.

Left alone with `add_dense`, autograd keeps for every layer both stacks, A x before and after the weights and x in the experts'
dtype, and copies what the base has put out. Kept here: x as it came, A x, and the parameters themselves, which backward stacks
again (a copy is small beside a product). For one token, with f = weights times scalings, h = A x and dy the gradient of y:

    dB = dy (f h)^T      df = h (B^T dy)      dh = f (B^T dy)      dA = dh x^T      dx = A^T dh

Shapes: B batch, S sequence, T = B * S tokens, R sum of the experts' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dylo_moe.errors import RoutingError
from dylo_moe.spread import Spread
from dylo_moe.sums import Sums


def add_lean(result: Tensor, x: Tensor, spread: Spread, sums: Sums) -> Tensor:
    """As `add_dense`, of sums without a stack. result: (B, S, out), overwritten where autograd allows it.

    x: (B, S, in), of any dtype; computed in the experts', or under autocast in autocast's. It can be differentiated twice;
    transforms of torch.func and forward-mode derivatives are refused by torch.

    Raises:
        RoutingError: in a second derivative while no expert's A learns.
    """
    factors, dtype = spread.factors_of_tokens(sums.signature), _working_dtype(x, sums)
    return LeanSum.apply(result, x.flatten(0, -2), factors, dtype, *sums.shrinks, *sums.expands)


def _working_dtype(x: Tensor, sums: Sums) -> torch.dtype:
    device = x.device.type
    if sums.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return sums.dtype
    return torch.get_autocast_dtype(device)


class LeanSum(torch.autograd.Function):
    """Of (result (B, S, out), x (T, in), factors (T, R), dtype to compute in, A of each expert, B of each expert)."""

    @staticmethod
    def forward(ctx: FunctionCtx, result: Tensor, x: Tensor, factors: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        shrinks, expands = _halves(parameters)
        hidden, expand = _hidden(x, shrinks, dtype), torch.cat(expands, dim=1).to(dtype).t()
        learn_shrinks, learn_expands = map(any, _halves(ctx.needs_input_grad[4:]))
        kept_hidden = hidden if learn_expands or ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x if learn_shrinks else None, kept_hidden, factors, *parameters)
        ctx.dtype = dtype
        weighted = (hidden * factors).to(dtype)
        if not _may_overwrite(result, dtype):
            return (result + (weighted @ expand).view(result.shape)).to(result.dtype)
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(weighted, expand)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, factors, *parameters = ctx.saved_tensors
        shrinks, expands = _halves(parameters)
        learn_result, learn_x, learn_factors, _, *learn = ctx.needs_input_grad
        learn_shrinks, learn_expands = _halves(learn)
        if torch.is_grad_enabled():  # somebody wants a gradient of this gradient
            hidden = _hidden_with_graph(x, shrinks, ctx.dtype)
        rows, of_expands = grad.flatten(0, -2).to(ctx.dtype), [None] * len(expands)
        if any(learn_expands):
            of_expands = _of_expands(rows, (hidden * factors).to(ctx.dtype), expands, learn_expands)
        back = rows @ torch.cat(expands, dim=1).to(ctx.dtype)  # (T, R)
        of_factors = back.to(factors.dtype) * hidden if learn_factors else None
        back = (back * factors).to(ctx.dtype)
        of_x = back @ torch.cat(shrinks).to(ctx.dtype) if learn_x else None
        of_shrinks = _of_shrinks(back, x, shrinks, learn_shrinks)
        return grad if learn_result else None, of_x, of_factors, None, *of_shrinks, *of_expands


def _halves(sequence: Sequence) -> tuple[Sequence, Sequence]:
    """What belongs to A, and what to B."""
    return sequence[: len(sequence) // 2], sequence[len(sequence) // 2 :]


def _hidden(x: Tensor, shrinks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A x, (T, R)."""
    return x.to(dtype) @ torch.cat(shrinks).to(dtype).t()


def _hidden_with_graph(x: Tensor | None, shrinks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What was kept is a number to autograd; a second derivative needs to know where it came from."""
    if x is None:
        raise RoutingError("a second derivative needs the layer's input, which is kept only while some expert's A learns")
    return _hidden(x, shrinks, dtype)


def _may_overwrite(result: Tensor, dtype: torch.dtype) -> bool:
    """Not a view, of which autograd would keep another account, nor a leaf, which it forbids."""
    is_leaf = result.is_leaf and result.requires_grad
    return result.dtype == dtype and result.is_contiguous() and not result._is_view() and not is_leaf


def _of_shrinks(back: Tensor, x: Tensor | None, shrinks: Sequence[Tensor], learn: Sequence[bool]) -> Sequence[Tensor | None]:
    """back: gradient of A x, (T, R) -> of each A that learns, (r, in); one product if all do."""
    ranks = [shrink.shape[0] for shrink in shrinks]
    if not any(learn):
        return [None] * len(ranks)
    rows = x.to(back.dtype)
    if all(learn):
        return (back.t() @ rows).split(ranks)
    return [part.t() @ rows if learns else None for part, learns in zip(back.split(ranks, dim=1), learn, strict=True)]


def _of_expands(rows: Tensor, weighted: Tensor, expands: Sequence[Tensor], learn: Sequence[bool]) -> Sequence[Tensor | None]:
    """rows: gradient of the output, (T, out); weighted: (T, R) -> of each B that learns, (out, r); one product if all do."""
    ranks = [expand.shape[1] for expand in expands]
    if not all(learn):
        return [rows.t() @ part if learns else None for part, learns in zip(weighted.split(ranks, dim=1), learn, strict=True)]
    together = rows.t() @ weighted  # (out, R)
    if len(set(ranks)) > 1:
        return together.split(ranks, dim=1)
    # Made contiguous in one piece: autograd would copy every one of them.
    return together.view(-1, len(ranks), ranks[0]).transpose(0, 1).contiguous().unbind()
