"""One KV cache for two passes: its first half holds the routed pass, its second half the router's feature pass.

Both halves are layers of one transformers Cache, so everything that generation does to a cache (reorder for beam
search, crop for assisted decoding, repeat, select, reset) reaches both, whatever the Cache class is.
"""

from __future__ import annotations

import copy

import torch
from transformers import Cache

from dylo_moe.errors import CacheWithoutFeatures

_SPLIT = "num_routed_layers"


def feature_half(cache: Cache, num_hidden_layers: int) -> Cache:
    """A view of the feature pass's layers; the first call doubles an empty cache in place.

    Args:
        cache: the cache that the routed pass uses.
        num_hidden_layers: layers of the base model, for caches that create their layers lazily.

    Raises:
        CacheWithoutFeatures: the cache holds tokens that the feature pass has not seen.
    """
    if not hasattr(cache, _SPLIT):
        if cache.get_seq_length() > 0:
            raise CacheWithoutFeatures(
                f"past_key_values holds {cache.get_seq_length()} tokens but not the router's features of them; "
                "pass the cache that this model returned, an empty one, or use_cache=False"
            )
        if not cache.layers:
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(num_hidden_layers))
        setattr(cache, _SPLIT, len(cache.layers))
        cache.layers.extend(copy.deepcopy(cache.layers))
    view = copy.copy(cache)
    view.layers = cache.layers[getattr(cache, _SPLIT) :]
    if not torch.compiler.is_compiling() and int(view.get_seq_length()) != int(cache.get_seq_length()):
        raise CacheWithoutFeatures(
            f"past_key_values holds {int(cache.get_seq_length())} tokens but the router's features of only "
            f"{int(view.get_seq_length())}: a step in between was given its weights or expert; start again without it"
        )
    return view


def halves(cache: Cache) -> tuple[list, list]:
    """The layers of the routed pass, and those of the feature pass; none of these where there is no such pass."""
    split = getattr(cache, _SPLIT, len(cache.layers))
    return cache.layers[:split], cache.layers[split:]


def set_halves(cache: Cache, routed: list, features: list) -> None:
    """Puts other layers in. Without features the cache is one that no feature pass has used."""
    cache.layers = [*routed, *features]
    if features:
        setattr(cache, _SPLIT, len(routed))
    elif hasattr(cache, _SPLIT):
        delattr(cache, _SPLIT)
