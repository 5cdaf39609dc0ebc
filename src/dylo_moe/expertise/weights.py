"""How alike experts are by their weights: the angle between their deltas, and between the subspaces that these read and write.

Shapes: E experts, r rank; a delta is scaling * B A, (out, in), and is never built: every number comes from products with r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dylo_moe.expertise.tracking import Track, silently
from dylo_moe.formats import Checkpoint, Expert, GatesState, LoraPair


@dataclass(frozen=True)
class WeightSimilarity:
    """Symmetric (E, E) arrays, NaN where not defined: an expert of norm 0, or one that is more than a sum of deltas.

    Attributes:
        experts: their names.
        norms: (E,), Frobenius norm of all deltas of an expert together; NaN where not defined.
        cosine: of all deltas together, as one vector each.
        by_module: module -> cosine of the deltas there.
        reads, writes: overlap of the row spaces (what is read of the input) and of the column spaces (where it is written to),
            0 to 1, the mean over the modules that both adapt.
        reasons: expert -> why its similarity is not defined.
    """

    experts: list[str]
    norms: np.ndarray
    cosine: np.ndarray
    by_module: dict[str, np.ndarray]
    reads: np.ndarray
    writes: np.ndarray
    reasons: dict[str, str]


def compare_weights(checkpoint: Checkpoint, track: Track = silently) -> WeightSimilarity:
    """How alike the experts' deltas are. An adapter that is always added is no expert and is left out."""
    experts = list(checkpoint.experts)
    reasons = {expert.name: reason for expert in experts if (reason := _undefined(expert, checkpoint))}
    defined = np.array([expert.name not in reasons for expert in experts])
    modules = list(dict.fromkeys(module for expert in experts for module in expert.modules))
    products, reads, writes = {}, [], []
    for module in track(modules, "weights"):
        pairs = [e.modules.get(module) if here else None for e, here in zip(experts, defined, strict=True)]
        products[module] = delta_products(pairs)
        spaces = [None if pair is None else delta_spaces(pair) for pair in pairs]
        writes.append(subspace_overlaps([None if space is None else space[0] for space in spaces]))
        reads.append(subspace_overlaps([None if space is None else space[1] for space in spaces]))
    total = sum(products.values(), np.zeros((len(experts), len(experts))))
    return WeightSimilarity(
        experts=[expert.name for expert in experts],
        norms=np.where(defined, np.sqrt(np.maximum(np.diag(total), 0.0)), math.nan),
        cosine=cosines(total),
        by_module={module: cosines(product) for module, product in products.items()},
        reads=_mean_where_known(reads, len(experts)),
        writes=_mean_where_known(writes, len(experts)),
        reasons=reasons,
    )


def _undefined(expert: Expert, checkpoint: Checkpoint) -> str | None:
    """Why an expert is not a sum of deltas, which is what a cosine is taken of."""
    if isinstance(checkpoint.router, GatesState) and checkpoint.router.level == "feed_forward":
        return "whole MLPs are mixed, not the deltas of their Linears"
    pairs = expert.modules.values()
    kinds = {
        "it is a DoRA, whose change of a weight is no multiple of B A": any(pair.magnitude is not None for pair in pairs),
        "its LoRA has biases": any(pair.bias is not None for pair in pairs),
        "it has whole modules of its own": bool(expert.replaced),
        "it has biases of its own": bool(expert.biases),
    }
    return next((reason for reason, found in kinds.items() if found), None)


def delta_products(pairs: Sequence[LoraPair | None]) -> np.ndarray:
    """Inner products of the deltas on one module, (E, E) in float64; 0 for an expert that does not adapt it (None).

    <s B A, t D C> = s t tr((B A)^T (D C)) = s t sum((B^T D) * (A C^T)): the trace is cyclic, so products of the low-rank
    factors are enough. Here for all pairs at once: the factors of all experts stand beside one another.
    """
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return np.zeros((len(pairs), len(pairs)))
    stacked_A = torch.cat([pair.lora_A.double() for pair in known])
    stacked_B = torch.cat([pair.lora_B.double() * pair.scaling for pair in known], dim=1)
    products = (stacked_B.T @ stacked_B) * (stacked_A @ stacked_A.T)
    return _block_sums(products, [0 if pair is None else pair.rank for pair in pairs])


def _block_sums(square: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """The sum of each block of a (sum of sizes, sum of sizes) matrix, (len(sizes), len(sizes))."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    belongs = (owner == np.arange(len(sizes))[:, None]).astype(float)
    return belongs @ square.numpy() @ belongs.T


def delta_spaces(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of where a delta writes, (out, k), and of what it reads, (in, k), where k is its numerical rank.

    B = Q R and A^T = P S give B A = Q (R S^T) P^T, so the singular vectors of the (r, r) core are enough. Singular values
    at or below max(out, in) * eps of the largest count as zero, as in numpy.linalg.matrix_rank.
    """
    out_basis, out_core = torch.linalg.qr(pair.lora_B.double())
    in_basis, in_core = torch.linalg.qr(pair.lora_A.double().T)
    left, values, right = torch.linalg.svd(out_core @ in_core.T)
    smallest = values.max() * max(len(out_basis), len(in_basis)) * torch.finfo(torch.float64).eps
    rank = int((values > smallest).sum())
    return out_basis @ left[:, :rank], in_basis @ right.T[:, :rank]


def subspace_overlaps(spaces: Sequence[Tensor | None]) -> np.ndarray:
    """|U^T V|_F^2 / min(k, l) for orthonormal bases U (n, k) and V (n, l), (E, E): the mean squared cosine of the principal
    angles.

    1 where the smaller space lies in the larger, 0 where they are orthogonal; max(k, l) / n is what chance gives. It is the
    measure of the LoRA paper (arXiv 2106.09685, section 7.2, equation 4). NaN where a space is empty or None.
    """
    known = [space for space in spaces if space is not None]
    sizes = np.array([0 if space is None else space.shape[1] for space in spaces])
    if not known:
        return np.full((len(spaces), len(spaces)), math.nan)
    basis = torch.cat(known, dim=1)
    smaller = np.minimum(sizes[:, None], sizes[None, :])
    overlaps = _block_sums((basis.T @ basis).square(), sizes) / np.maximum(smaller, 1)
    return np.where(smaller > 0, np.clip(overlaps, 0.0, 1.0), math.nan)


def cosines(products: np.ndarray) -> np.ndarray:
    """Inner products (E, E) -> cosines; NaN for a vector of norm 0. Rounding never takes one outside of [-1, 1]."""
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = products / norms[:, None] / norms[None, :]
    scaled[~np.isfinite(scaled)] = math.nan
    return np.clip(scaled, -1.0, 1.0)


def _mean_where_known(matrices: Sequence[np.ndarray], experts: int) -> np.ndarray:
    """The mean over the matrices of what is not NaN; NaN where all are."""
    stacked = np.array(matrices).reshape(-1, experts, experts)
    known = ~np.isnan(stacked)
    counts = known.sum(0)
    return np.where(counts > 0, np.where(known, stacked, 0.0).sum(0) / np.maximum(counts, 1), math.nan)


def alike(similarity: WeightSimilarity, threshold: float) -> list[tuple[int, int]]:
    """Pairs of experts whose deltas' cosine is at least the threshold."""
    cosine = similarity.cosine
    return [(i, j) for i in range(len(cosine)) for j in range(i + 1, len(cosine)) if cosine[i, j] >= threshold]


def without_effect(checkpoint: Checkpoint) -> list[int]:
    """Experts that change nothing: every delta is exactly zero and there is nothing beside them.

    A DoRA is never one of them: its magnitude changes a weight although its delta is zero.
    """
    return [index for index, expert in enumerate(checkpoint.experts) if _is_zero(expert)]


def _is_zero(expert: Expert) -> bool:
    pairs = expert.modules.values()
    if expert.replaced or expert.biases or any(pair.magnitude is not None for pair in pairs):
        return False
    changing = (bool(pair.lora_A.any() and pair.lora_B.any() and pair.scaling) for pair in pairs)
    return not any(changing) and not any(pair.bias is not None and bool(pair.bias.any()) for pair in pairs)
