"""A KV cache whose rows come and go while a batch is being written.

Columns are counted from the right: the newest token of every row is in the last column, and what a row does not have on the
left is masked. So rows of different lengths can share a cache, join it and leave it. A feature pass's half (caches.py) may have
rows for fewer sequences than the routed half: only those that the router decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dylo_moe.caches import halves, set_halves

_SPARE = 32  # columns


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that writes new tokens into spare columns, where the stock one copies all the earlier ones at each step."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    @classmethod
    def over(cls, keys: Tensor, values: Tensor, length: int) -> RoomyLayer:
        """A layer whose room is there already, (rows, heads, columns, width), with `length` columns in use."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer._room = keys, values
        layer.keys, layer.values = (room[..., :length, :] for room in layer._room)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: (rows, heads, new, width) -> all of them so far, (rows, heads, length, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if not self._has_room(total, key_states, value_states):
            self._room = _grown(self.keys, key_states, length, total), _grown(self.values, value_states, length, total)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., length:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self._room)
        return self.keys, self.values

    def _has_room(self, total: int, *new: Tensor) -> bool:
        # Whoever selects rows or cuts columns puts other tensors in the place of keys and values.
        room = self._room and self._room[0]
        is_ours = room is not None and room.data_ptr() == self.keys.data_ptr() and room.shape[0] == self.keys.shape[0]
        return is_ours and total <= room.shape[-2] and all(map(_holds, self._room, new))


def roomy_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def can_pad(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can be in one batch of a transformers model and each computes what it computes alone.

    Every layer has to keep one column per token: linear attention and state spaces do not. And attention written out ("eager")
    gives NaN for padding in float64 (docs/findings.md), which spreads to the row's tokens.
    """
    if model.dtype == torch.float64 and model.config.get_text_config()._attn_implementation == "eager":
        return False
    cache = roomy_cache(model.config)
    lazily = cache.layer_class_to_replicate in (None, RoomyLayer)
    return lazily and all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def keep_rows(cache: Cache, rows: Tensor, feature_rows: Tensor) -> None:
    """Keeps these rows of the routed half and of the feature half, in this order; all features leave with their last row."""
    routed, features = halves(cache)
    for layer in routed:
        layer.batch_select_indices(rows)
    for layer in features:
        layer.batch_select_indices(feature_rows)
    if len(feature_rows) == 0:
        set_halves(cache, routed, [])


def join_rows(cache: Cache, joining: Cache) -> None:
    """Puts the rows of `joining`, which is of no more use, behind those of `cache`."""
    length = max(cache.get_seq_length(), joining.get_seq_length())
    routed, features = halves(cache)
    their_routed, their_features = halves(joining)
    for layer, other in zip(routed, their_routed, strict=True):
        _join(layer, other, length)
    if features and their_features:
        for layer, other in zip(features, their_features, strict=True):
            _join(layer, other, length)
    else:
        features = features or their_features
        for layer in features:
            _lengthen(layer, length)
    set_halves(cache, routed, features)


def drop_columns(cache: Cache, columns: int) -> None:
    """Forgets the first columns, in which no row has a token."""
    for layer in filter(lambda layer: layer.is_initialized, cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= columns
            surplus = max(0, layer.keys.shape[-2] - layer.cumulative_length)
        else:
            surplus = columns
        layer.keys, layer.values = layer.keys[..., surplus:, :], layer.values[..., surplus:, :]


def _join(layer: DynamicLayer, other: DynamicLayer, length: int) -> None:
    if not layer.is_initialized:  # a layer that uses another one's keys
        return
    _lengthen(layer, length)
    _lengthen(other, length)
    layer.keys = torch.cat([layer.keys, other.keys])
    layer.values = torch.cat([layer.values, other.values])


def _lengthen(layer: DynamicLayer, length: int) -> None:
    """Zeros on the left until the layer has seen `length` tokens; a sliding window keeps its last ones only."""
    if not layer.is_initialized:
        return
    wanted = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
        wanted = min(length, layer.sliding_window - 1)
    missing = wanted - layer.keys.shape[-2]
    if missing > 0:
        layer.keys, layer.values = (torch.nn.functional.pad(t, (0, 0, missing, 0)) for t in (layer.keys, layer.values))


def _holds(room: Tensor, new: Tensor) -> bool:
    return torch.promote_types(room.dtype, new.dtype) == room.dtype


def _grown(old: Tensor, new: Tensor, length: int, total: int) -> Tensor:
    dtype = torch.promote_types(old.dtype, new.dtype) if length else new.dtype  # as torch.cat has it
    room = new.new_empty(*new.shape[:-2], total + _SPARE, new.shape[-1], dtype=dtype)
    if length:
        room[..., :length, :] = old
    return room
