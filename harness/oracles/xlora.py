"""The definition of X-LoRA's scalings (arXiv 2402.07148, as PEFT 0.15 to 0.21 computes them): hidden states -> weights.

In float64. z = MLP(h), h the last hidden state of the base model without adapters, (..., E), or (..., L, E) if layerwise;
scalings = softmax(z / temperature), or z itself; times the mask of the top_k, not renormalised; then, if asked for, a softmax
over the scalings that are not 0; times the global weight, so that y = W x + sum_e w_e s_e B_e A_e x.

H hidden size, E experts, L routed layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.oracles.router import router_logits, softmax

Linear = tuple[np.ndarray, "np.ndarray | None"]


@dataclass(frozen=True)
class Scaling:
    """What follows the classifier's last Linear.

    softmax_topk: over the experts of one token in one layer, as PEFT has it since its fix (peft #2793, 0.18).
    over_batch: that softmax is one over the selected entries of all tokens and rows of a pass, as the standalone package has it.
        It is written into the scalings, which all layers share where neither a softmax nor a top_k made a copy of them: there
        layer l has the softmax l + 1 times.
    """

    num_experts: int
    num_layers: int
    layerwise: bool = False
    softmax: bool = True
    softmax_topk: bool = False
    over_batch: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    global_weight: float = 1.0


def scores(hidden: np.ndarray, layers: tuple[Linear, ...], *, relu: bool = True) -> np.ndarray:
    """z, (..., outputs of the last Linear): ReLU between the Linears, none after the last."""
    z = np.asarray(hidden, np.float64)
    for index, (weight, bias) in enumerate(layers):
        z = router_logits(np.maximum(z, 0.0) if index and relu else z, weight, bias)
    return z


def by_layer(scaling: Scaling, z: np.ndarray) -> np.ndarray:
    """(..., E or L E) -> (..., 1 or L, E): one row per decision."""
    rows = scaling.num_layers if scaling.layerwise else 1
    return np.asarray(z, np.float64).reshape(*z.shape[:-1], rows, scaling.num_experts)


def weights(scaling: Scaling, z: np.ndarray) -> np.ndarray:
    """z (..., E or L E) -> (..., E), or (..., L, E) where the layers differ."""
    given = by_layer(scaling, z)
    found = softmax(given / scaling.temperature) if scaling.softmax else given
    if scaling.top_k is not None:
        order = np.argsort(-found, axis=-1, kind="stable")[..., : scaling.top_k]
        kept = np.zeros(found.shape, bool)
        np.put_along_axis(kept, order, True, axis=-1)
        found = np.where(kept, found, 0.0)
    if scaling.softmax_topk and scaling.over_batch:
        found = _over_batch(scaling, found)
    elif scaling.softmax_topk:
        found = np.where(found != 0, softmax(np.where(found != 0, found, -np.inf)), 0.0)
    found = scaling.global_weight * found
    return found if found.shape[-2] > 1 or scaling.layerwise else found[..., 0, :]


def _over_batch(scaling: Scaling, found: np.ndarray) -> np.ndarray:
    """(..., 1 or L, E) -> the same, or (..., L, E) where every layer takes the softmax of the layer before's."""
    layers = [_of_all(found[..., layer, :]) for layer in range(found.shape[-2])]
    if not (scaling.layerwise or scaling.softmax or scaling.top_k is not None):
        while len(layers) < scaling.num_layers:
            layers.append(_of_all(layers[-1]))
    return np.stack(layers, axis=-2)


def _of_all(entries: np.ndarray) -> np.ndarray:
    """One softmax over all entries that are not 0."""
    present = entries != 0
    shares = np.zeros_like(entries)
    shares[present] = softmax(entries[present])
    return shares


def margin(scaling: Scaling, z: np.ndarray) -> np.ndarray:
    """Gap in z between the last expert that is kept and the first that is not, at the layer where it is least: (...,)."""
    given = by_layer(scaling, z)
    if scaling.top_k is None or scaling.top_k >= scaling.num_experts:
        return np.full(given.shape[:-2], np.inf)
    descending = -np.sort(-given, axis=-1)
    return (descending[..., scaling.top_k - 1] - descending[..., scaling.top_k]).min(axis=-1)


def sensitivity(scaling: Scaling) -> float:
    """How far a weight moves, at most, per unit that z moves: each softmax at most halves it, the temperature divides it."""
    slope = 0.5 / scaling.temperature if scaling.softmax else 1.0
    return abs(scaling.global_weight) * slope * (0.5 if scaling.softmax_topk else 1.0)
