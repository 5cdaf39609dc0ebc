"""The two halves of a KV cache (caches.py) as the rows of one, so that one pass can take both a step further.

Shapes: B rows of the batch, n tokens that both halves have. Rows 0 to B-1 are the routed pass's, one column to the right: the
newest column has their token n beside the feature rows' token n + 1. Their column 0 is zero, and has to be masked.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from dylo_moe.caches import halves
from dylo_moe.row_cache import RoomyLayer

_SPARE = 32  # columns


def can_pair(cache: Cache) -> bool:
    """Whether all layers are such that keep every token of theirs, on the device, and nothing else."""
    return type(cache) is DynamicCache and not cache.offloading and all(map(_keeps_all, cache.layers))


def _keeps_all(layer: object) -> bool:
    return type(layer) in (DynamicLayer, RoomyLayer) and layer.is_initialized


class PairedCache:
    """Keys and values of both halves in common rooms, which the cache's own layers are views of.

    What the cache shows is never written to again: whoever kept it, or cuts the cache, keeps what was there.

    Args:
        cache: as `can_pair` wants it, with both halves, of the same length.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.length = int(cache.get_seq_length())
        self._pairs = [_Pair(*layers) for layers in zip(*halves(cache), strict=True)]

    def is_intact(self, cache: Cache) -> bool:
        """Whether `cache` is this one, and nobody else has written to it, cut it or moved its rows."""
        return cache is self.cache and all(pair.is_intact() for pair in self._pairs)

    def feature_rows(self, tokens: int) -> Cache:
        """For a pass over the feature rows' next tokens, (B, tokens)."""
        self._reserve(tokens)
        return self._view([RoomyLayer.over(*pair.feature_rooms, self.length) for pair in self._pairs])

    def routed_rows(self, tokens: int) -> Cache:
        """For a pass over the routed rows' next tokens, (B, tokens)."""
        self._reserve(tokens)
        return self._view([RoomyLayer.over(*pair.routed_rooms, self.length) for pair in self._pairs])

    def both_rows(self) -> Cache:
        """For a pass over the routed rows' next token and the feature rows' one after that, (2B, 1)."""
        self._reserve(1)
        return self._view([RoomyLayer.over(*pair.rooms, self.length + 1) for pair in self._pairs])

    def show_features(self) -> None:
        """The cache's feature half has its next token."""
        for pair in self._pairs:
            pair.show(self.length, self.length + 1)

    def show_routed(self) -> None:
        """The cache's routed half has it too. What the rows have after it stays hidden."""
        self.length += 1
        for pair in self._pairs:
            pair.show(self.length, self.length)

    def settle(self) -> None:
        """The cache's layers have tensors of their own again, of the layout that transformers gives them."""
        for pair in self._pairs:
            pair.settle()

    def _reserve(self, tokens: int) -> None:
        """Room for so many tokens of both halves: what is hidden would not survive a move between their passes."""
        for pair in self._pairs:
            pair.reserve(self.length + 1 + tokens)

    def _view(self, layers: list) -> Cache:
        view = copy.copy(self.cache)
        view.layers = layers
        return view


class _Pair:
    """One layer of each half."""

    def __init__(self, routed: DynamicLayer, features: DynamicLayer) -> None:
        self.routed, self.features = routed, features
        self.rows = routed.keys.shape[0]
        self.rooms: tuple[Tensor, Tensor] | None = None  # of keys and of values, (2B, heads, columns, width)
        self._shown: list[Tensor] = []
        self._versions: list[int] = []

    @property
    def routed_rooms(self) -> list[Tensor]:
        return [room[: self.rows, :, 1:] for room in self.rooms]

    @property
    def feature_rooms(self) -> list[Tensor]:
        return [room[self.rows :] for room in self.rooms]

    def is_intact(self) -> bool:
        same = all(now is then for now, then in zip(self._now(), self._shown, strict=True))
        return same and self._versions == [room._version for room in self.rooms]

    def show(self, routed: int, features: int) -> None:
        """Numbers of tokens."""
        self.routed.keys, self.routed.values = (room[:, :, :routed] for room in self.routed_rooms)
        self.features.keys, self.features.values = (room[:, :, :features] for room in self.feature_rooms)
        self._shown, self._versions = self._now(), [room._version for room in self.rooms]

    def settle(self) -> None:
        if self.rooms is not None and self.is_intact():
            for layer in (self.routed, self.features):
                layer.keys, layer.values = (t.clone(memory_format=torch.contiguous_format) for t in (layer.keys, layer.values))

    def reserve(self, columns: int) -> None:
        if self.rooms is None or self.rooms[0].shape[-2] < columns:
            routed, features = (layer.keys.shape[-2] for layer in (self.routed, self.features))
            keys, values = self._room(*self._now()[:2], columns), self._room(*self._now()[2:], columns)
            self.rooms = keys, values
            self.show(routed, features)

    def _room(self, routed: Tensor, features: Tensor, columns: int) -> Tensor:
        room = routed.new_empty(2 * self.rows, routed.shape[1], columns + _SPARE, routed.shape[-1])
        room[: self.rows, :, 0] = 0
        room[: self.rows, :, 1 : routed.shape[-2] + 1] = routed
        room[self.rows :, :, : features.shape[-2]] = features
        return room

    def _now(self) -> list[Tensor]:
        return [self.routed.keys, self.features.keys, self.routed.values, self.features.values]
