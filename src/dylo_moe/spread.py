"""What routing weights say about the tokens of a pass: which experts each token uses, and how much.

Shapes: B batch, S sequence, T = B * S tokens, E experts, R sum of the experts' ranks in a layer, P pairs of a token and an expert
that it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# (column of the routing weights, scaling, rank) of each expert that a layer has.
Signature = tuple[tuple[int, float, int], ...]

# Pairs of one gathered piece: small enough for the cache, large enough that moving them costs few calls.
_CHUNK = 512
_FILLED = 1.5  # so many times an expert's tokens may be computed, so that several experts take one product
_MOST_LAYOUTS = 256


def _runs(signature: Signature) -> list[tuple[int, int, float, int]]:
    """(first column, last column, scaling, rank) of neighbours that are alike."""
    found: list[tuple[int, int, float, int]] = []
    for column, scaling, rank in signature:
        if found and found[-1][1:] == (column - 1, scaling, rank):
            found[-1] = (found[-1][0], column, scaling, rank)
        else:
            found.append((column, column, scaling, rank))
    return found


@dataclass(frozen=True)
class Chunk:
    """Pairs of whole experts of one rank, expert by expert, equally many for each: those of few tokens are filled with token 0,
    weighed 0.

    tokens: (P,); factors: weights times scalings, (P, 1); places: of the experts in the signature.
    """

    tokens: Tensor
    factors: Tensor
    places: list[int]


class Ahead:
    """What a layer has worked out for those that read the same tensor after it."""

    def __init__(self) -> None:
        self._read: Tensor | None = None
        self._parts: dict[nn.Module, tuple] = {}

    def put(self, read: Tensor, parts: dict[nn.Module, tuple]) -> None:
        """parts: for each of those layers."""
        if parts:
            self._read, self._parts = read, parts

    def taken(self, read: Tensor, layer: nn.Module) -> tuple | None:
        """The layer's part, once; None where there is none, or where it reads another tensor."""
        if self._read is not read or layer not in self._parts:
            return None
        part = self._parts.pop(layer)
        if not self._parts:
            self._read = None
        return part


class Spread:
    """Worked out once for all layers that share the weights; layers that have the same experts share the rest too.

    Args:
        weights: (B, S, E), or 1 in the place of B and S.
        shape: (B, S).
        layouts: kept from pass to pass by the caller: where each signature's scalings are on the device.
    """

    def __init__(self, weights: Tensor, shape: tuple[int, int], layouts: dict[tuple, tuple[Tensor, Tensor]]) -> None:
        # At least float32: they multiply the small (B, S, R) tensor, so precision is cheap here.
        self.weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        self.shape = shape
        self.tokens = shape[0] * shape[1]
        self.grows = torch.is_grad_enabled()  # the rest is worked out with a graph
        self.choices: dict[tuple, bool] = {}  # dense or grouped, for the layers so far
        self.plans: dict[int, Tensor | bool] = {}  # the factors for each kind of plain layers, False where grouped does less work
        self.ahead = Ahead()
        self._layouts = layouts
        self._factors: dict[Signature, Tensor] = {}
        self._factors_of_tokens: dict[Signature, Tensor] = {}
        self._groups: dict[Signature, list[list[int]]] = {}
        self._chunks: dict[Signature, list[Chunk]] = {}

    def factors(self, signature: Signature) -> Tensor:
        """Weights times scalings at each of the stacked rows, (B|1, S|1, R)."""
        if signature not in self._factors:
            if torch.compiler.is_compiling():
                self._factors[signature] = self._factors_without_layout(signature)
            else:
                columns, scales = self._layout(signature)
                self._factors[signature] = self.weights.index_select(-1, columns) * scales
        return self._factors[signature]

    def _factors_without_layout(self, signature: Signature) -> Tensor:
        """For a graph: a tensor that it made of numbers would be copied from the host each time, which no CUDA graph holds."""
        parts = []
        for first, last, scaling, rank in _runs(signature):
            scaled = self.weights[..., first : last + 1] * scaling
            parts.append(scaled.unsqueeze(-1).expand(*scaled.shape, rank).flatten(-2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def factors_of_tokens(self, signature: Signature) -> Tensor:
        """The same for every token, (T, R)."""
        if signature not in self._factors_of_tokens:
            self._factors_of_tokens[signature] = self.factors(signature).expand(*self.shape, -1).flatten(0, 1)
        return self._factors_of_tokens[signature]

    def _layout(self, signature: Signature) -> tuple[Tensor, Tensor]:
        """For each of the R stacked rows: its expert's column in the weights, and its expert's scaling. Both (R,)."""
        key = (signature, str(self.weights.device), self.weights.dtype)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _MOST_LAYOUTS:  # scalings that change at every step
                self._layouts.clear()
            with torch.inference_mode(False):  # kept for later passes, which may need gradients
                rows = [(column, scaling) for column, scaling, rank in signature for _ in range(rank)]
                columns = torch.tensor([column for column, _ in rows], device=self.weights.device)
                scales = torch.tensor([scaling for _, scaling in rows], device=self.weights.device, dtype=self.weights.dtype)
            layout = self._layouts[key] = (columns, scales)
        return layout

    @cached_property
    def counts(self) -> list[int]:
        """Tokens that use each expert, that is, whose weight is not 0."""
        used = self.weights != 0
        if used.shape[:2] == (1, 1):
            return [self.tokens * used for used in used[0, 0].tolist()]
        return used.expand(*self.shape, -1).sum((0, 1)).tolist()

    def chunks(self, signature: Signature) -> list[Chunk]:
        """The pairs, in chunks of at most _CHUNK or of one expert that has more."""
        if signature not in self._chunks:
            self._chunks[signature] = [self._chunk(signature, places) for places in self.groups(signature)]
        return self._chunks[signature]

    def groups(self, signature: Signature) -> list[list[int]]:
        """Places of the experts of each chunk, those with more tokens first."""
        if signature not in self._groups:
            self._groups[signature] = self._found_groups(signature)
        return self._groups[signature]

    def _found_groups(self, signature: Signature) -> list[list[int]]:
        found: list[list[int]] = []
        used = [place for place, (column, _, _) in enumerate(signature) if self.counts[column]]
        for place in sorted(used, key=lambda place: (signature[place][2], self.counts[signature[place][0]]), reverse=True):
            if not (found and self._may_join(signature, found[-1], place)):
                found.append([])
            found[-1].append(place)
        return found

    def _may_join(self, signature: Signature, places: list[int], place: int) -> bool:
        (most, _, rank), (column, _, own) = signature[places[0]], signature[place]
        count = self.counts[most]
        return rank == own and count <= _FILLED * self.counts[column] and count * (len(places) + 1) <= _CHUNK

    def _chunk(self, signature: Signature, places: list[int]) -> Chunk:
        tokens, weights = self._pairs
        columns = [signature[place][0] for place in places]
        scaled = [weights[column] * signature[place][1] for column, place in zip(columns, places, strict=True)]
        chosen = pad_sequence([tokens[column] for column in columns], batch_first=True)
        return Chunk(chosen.flatten(), pad_sequence(scaled, batch_first=True).view(-1, 1), places)

    @cached_property
    def _pairs(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For each expert the tokens that use it, and their weights."""
        by_expert = self.weights.expand(*self.shape, -1).flatten(0, 1).t()  # (E, T)
        experts, tokens = by_expert.nonzero(as_tuple=True)
        return tokens.split(self.counts), by_expert[experts, tokens].split(self.counts)
