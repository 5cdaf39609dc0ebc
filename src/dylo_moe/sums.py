"""y + sum_e w_e s_e B_e A_e x of one layer, by whichever of two ways does less work, each with gradients.

dense:   all experts' A one below the other, the weights times the scalings on their outputs, all B side by side: two products.
grouped: each expert's products for the tokens that use it alone, filled up where several experts take one product.

Shapes: B batch, S sequence, T tokens, R sum of the experts' ranks, r one expert's, P pairs of a token and an expert that it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dylo_moe.spread import Chunk, Signature, Spread

# What things cost, in multiply-adds of a large product; measured in float32 on one core, and within a factor of two elsewhere,
# as the two ways differ where the choice matters.
_READ = 4  # to read a number of a weight that few tokens use
_COPY = 10  # to copy it into a stack
_SKINNY = 2.5  # a product of one expert's few rows, beside the same work in a large one
_MOVE = 16  # to gather a number of a token, or to add it back
_CALL = 400_000  # to start a product, a gathering or an addition
_FORK = 2_500_000  # the same in several threads, which have to be woken
_CLEARLY = 0.8  # grouped has to cost less than this share of dense


@dataclass(frozen=True)
class Sums:
    """The experts of one layer that are sums of deltas.

    shrinks: A (r, in); expands: B (out, r) of each; stack: all of them as (R, in) and (R, out), where they are kept.
    """

    signature: Signature
    shrinks: list[Tensor]
    expands: list[Tensor]
    stack: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.shrinks[0].dtype

    def stacked(self) -> Sums:
        """The same with a stack: a copy, which does not follow its parameters."""
        return replace(self, stack=(torch.cat(self.shrinks), torch.cat([expand.t() for expand in self.expands])))

    def cheaper_grouped(self, spread: Spread) -> bool:
        """Whether the grouped way costs clearly less, by counted work."""
        if self.kind not in spread.choices:
            spread.choices[self.kind] = self._grouped_cost(spread) < _CLEARLY * self._dense_cost(spread)
        return spread.choices[self.kind]

    @property
    def kind(self) -> tuple:
        """What the choice depends on, beside the weights."""
        return self.signature, self._width, self.stack is None

    @property
    def _width(self) -> int:
        """in + out."""
        return self.shrinks[0].shape[1] + self.expands[0].shape[0]

    def _dense_cost(self, spread: Spread) -> float:
        of_a_number = spread.tokens + _READ + (_COPY if self.stack is None else 0)
        return of_a_number * sum(rank for _, _, rank in self.signature) * self._width + 2 * _call(spread.tokens)

    def _grouped_cost(self, spread: Spread) -> float:
        if spread.tokens == 1:
            ranks = [rank for column, _, rank in self.signature if spread.counts[column]]
            return (_SKINNY + _READ) * sum(ranks) * self._width + 2 * _CALL * len(ranks)
        return sum(self._group_cost(spread, places) for places in spread.groups(self.signature))

    def _group_cost(self, spread: Spread, places: list[int]) -> float:
        """places: of the group's experts."""
        column, _, rank = self.signature[places[0]]
        count, is_stacked = spread.counts[column], len(places) > 1
        products = (_SKINNY * count + _READ + (_COPY if is_stacked else 0)) * rank * self._width
        return len(places) * (products + _MOVE * count * self._width) + (6 if is_stacked else 4) * _call(spread.tokens)


def _call(tokens: int) -> int:
    """Of one token, a product is not spread over threads."""
    return _CALL if tokens == 1 or torch.get_num_threads() == 1 else _FORK


def add_dense(result: Tensor, x: Tensor, spread: Spread, sums: Sums, hidden: Tensor | None = None) -> Tensor:
    """result: (B, S, out), overwritten where no graph is recorded; x: (B, S, in) -> (B, S, out).

    hidden: all A x, (B, S, R), where they are not simply that.
    """
    shrink, expand = sums.stack or (torch.cat(sums.shrinks), torch.cat(sums.expands, dim=1).t())
    hidden = F.linear(x, shrink) if hidden is None else hidden
    hidden = _times(hidden, spread.factors(sums.signature)).to(sums.dtype).flatten(0, -2)
    if result.dtype != sums.dtype:
        return (result + (hidden @ expand).view(result.shape)).to(result.dtype)
    if torch.is_grad_enabled() or not result.is_contiguous():
        return torch.addmm(result.flatten(0, -2), hidden, expand).view(result.shape)
    result.view(-1, result.shape[-1]).addmm_(hidden, expand)
    return result


def add_grouped(result: Tensor, x: Tensor, spread: Spread, sums: Sums) -> Tensor:
    """As add_dense, for the pairs alone."""
    dtype, grows = torch.promote_types(result.dtype, sums.dtype), torch.is_grad_enabled()
    mixed = result.flatten(0, -2).to(dtype, copy=grows)  # a graph may hold the base's output
    tokens = x.flatten(0, -2)
    for chunk in spread.chunks(sums.signature):
        if len(tokens) == 1:
            mixed = _added_to_one(mixed, tokens, chunk, sums)
        else:
            mixed.index_add_(0, chunk.tokens, _deltas(tokens.index_select(0, chunk.tokens), chunk, sums).to(dtype))
    return mixed.view(result.shape).to(result.dtype)


def _added_to_one(mixed: Tensor, token: Tensor, chunk: Chunk, sums: Sums) -> Tensor:
    """For a single token: nothing to gather. mixed: (1, out); token: (1, in)."""
    for place, factor in zip(chunk.places, chunk.factors, strict=True):
        hidden = (F.linear(token, sums.shrinks[place]) * factor).to(sums.dtype)
        mixed = torch.addmm(mixed, hidden.to(mixed.dtype), sums.expands[place].t().to(mixed.dtype))
    return mixed


def _deltas(rows: Tensor, chunk: Chunk, sums: Sums) -> Tensor:
    """rows: the tokens of the chunk's pairs, (P, in) -> (P, out)."""
    hidden = _products(rows, [sums.shrinks[place] for place in chunk.places])
    hidden = _times(hidden, chunk.factors).to(sums.dtype)
    return _products(hidden, [sums.expands[place] for place in chunk.places])


def _times(hidden: Tensor, factors: Tensor) -> Tensor:
    if torch.is_grad_enabled() or hidden.dtype != factors.dtype:
        return hidden * factors
    return hidden.mul_(factors)


def _products(rows: Tensor, matrices: list[Tensor]) -> Tensor:
    """Each of equal runs of rows (P, i) times its own matrix (o, i) -> (P, o). In several threads, a product of few rows takes
    longer to start than to compute, so it is one for all runs."""
    if len(matrices) == 1:
        return F.linear(rows, matrices[0])
    return torch.bmm(rows.view(len(matrices), -1, rows.shape[1]), torch.stack(matrices).transpose(1, 2)).flatten(0, 1)
