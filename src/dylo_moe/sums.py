"""y + sum_e w_e s_e B_e A_e x of one layer, by whichever of two ways does less work, each with gradients.

dense:   all experts' A one below the other, the weights times the scalings on their outputs, all B side by side: two products.
grouped: each expert's products for the tokens that use it alone; what top-k weights leave out is not computed.

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
_CALL = 400_000  # to start a product
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
        return of_a_number * sum(rank for _, _, rank in self.signature) * self._width + 2 * _CALL

    def _grouped_cost(self, spread: Spread) -> float:
        used = [(spread.counts[column], rank) for column, _, rank in self.signature if spread.counts[column]]
        products = sum((_SKINNY * count + _READ) * rank for count, rank in used) * self._width
        moves = 0 if spread.tokens == 1 else _MOVE * self._width * sum(count for count, _ in used)
        return products + moves + 2 * _CALL * len(used)


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
    hidden = _products(rows, [sums.shrinks[place] for place in chunk.places], chunk.sizes)
    hidden = _times(hidden, chunk.factors).to(sums.dtype)
    return _products(hidden, [sums.expands[place] for place in chunk.places], chunk.sizes)


def _times(hidden: Tensor, factors: Tensor) -> Tensor:
    if torch.is_grad_enabled() or hidden.dtype != factors.dtype:
        return hidden * factors
    return hidden.mul_(factors)


def _products(rows: Tensor, matrices: list[Tensor], sizes: list[int]) -> Tensor:
    """Each run of rows (P, i) times its own matrix (o, i) -> (P, widest o); what a matrix does not fill is not to be used."""
    runs = [run[:, : matrix.shape[1]] for run, matrix in zip(rows.split(sizes), matrices, strict=True)]
    widest = max(len(matrix) for matrix in matrices)
    if torch.is_grad_enabled():
        outputs = [F.linear(run, matrix) for run, matrix in zip(runs, matrices, strict=True)]
        return torch.cat([F.pad(output, (0, widest - output.shape[1])) for output in outputs])
    out = rows.new_empty(len(rows), widest)
    for run, matrix, into in zip(runs, matrices, out.split(sizes), strict=True):
        torch.mm(run, matrix.t(), out=into[:, : len(matrix)])
    return out
