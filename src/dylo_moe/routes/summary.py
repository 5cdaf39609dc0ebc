"""The analysis as a document: plain values that json can write. `routing_analysis.schema.json` beside this file describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dylo_moe.routes.findings import THRESHOLDS, findings, overall_share
from dylo_moe.routes.measures import balance_losses, dominant, effective_experts, information, variation
from dylo_moe.routes.tally import BINS, PARTS, Sums, Tally

SCHEMA = 1


def summarise(tally: Tally, *, tasks: Sequence[str], experts: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """The numbers of an analysis.

    Args:
        tasks, experts, layers: names, in the tally's order; one layer stands for all of them where they share the weights.
    """
    return {
        "tokens": int(tally.tokens.sum()),
        "prompt_tokens": int(tally.part_tokens[0]),
        "completion_tokens": int(tally.part_tokens[1]),
        "not_finite": tally.broken,
        "without_expert": tally.unrouted,
        "findings": [asdict(finding) for finding in findings(tally, experts, layers)],
        "thresholds": {name: asdict(threshold) for name, threshold in THRESHOLDS.items()},
        "balance": _balance(tally),
        "decision": _decision(tally.layers, tally.histograms),
        "decision_before_top_k": _decision(tally.before, tally.before_histograms) if tally.before.count.sum() else None,
        "task_information_bits": information(tally.tasks.mean(tally.tasks.share), tally.tasks.count),
        "largest_variation_over_tokens": float(tally.spread.max()),
        "tasks": _tasks(tally, tasks),
        "positions": {
            "width": tally.width,
            "share": tally.places.mean(tally.places.share).tolist(),
            "tokens": (tally.places.count / len(layers)).tolist(),
        },
        "parts": {
            name: tally.parts.mean(tally.parts.share)[place].tolist() if tally.part_tokens[place] else None
            for place, name in enumerate(PARTS)
        },
        "layers": _layers(tally, layers),
    }


def _balance(tally: Tally) -> dict[str, Any]:
    share, first = overall_share(tally), tally.layers.first.sum(axis=0)
    mean_weight = tally.weight / max(tally.pairs, 1)
    return {
        "share": share.tolist(),
        "first": (first / max(tally.layers.count.sum(), 1.0)).tolist(),
        "mean_weight": mean_weight.tolist(),
        "coefficient_of_variation": variation(share),
        "effective_experts": effective_experts(share) if share.any() else 0.0,
        "load_balancing_loss": balance_losses(mean_weight, first / max(tally.pairs, 1)),
    }


def _decision(sums: Sums, histograms: dict[str, np.ndarray]) -> dict[str, Any]:
    count = max(sums.count.sum(), 1.0)
    edges = np.linspace(0.0, 1.0, BINS + 1).round(6).tolist()
    return {
        name: {"mean": float(getattr(sums, name).sum() / count), "edges": edges, "counts": counts.tolist()}
        for name, counts in histograms.items()
    }


def _tasks(tally: Tally, names: Sequence[str]) -> list[dict[str, Any]]:
    sums = tally.tasks
    share, first = sums.mean(sums.share), sums.mean(sums.first)
    confidence, entropy = sums.mean(sums.confidence), sums.mean(sums.entropy)
    return [
        {
            "task": name,
            "texts": int(tally.texts[number]),
            "tokens": int(tally.tokens[number]),
            "dominant": dominant(share[number]),
            "share": share[number].tolist(),
            "first": first[number].tolist(),
            "confidence": float(confidence[number]),
            "entropy": float(entropy[number]),
        }
        for number, name in enumerate(names)
    ]


def _layers(tally: Tally, names: Sequence[str]) -> list[dict[str, Any]]:
    sums = tally.layers
    share, spread = sums.mean(sums.share), tally.spread.max(axis=1)
    confidence, entropy = sums.mean(sums.confidence), sums.mean(sums.entropy)
    return [
        {
            "layer": name,
            "experts": int(tally.here[number]),
            "dominant": dominant(share[number]),
            "share": share[number].tolist(),
            "confidence": float(confidence[number]),
            "entropy": float(entropy[number]),
            "variation_over_tokens": float(spread[number]),
            "coefficient_of_variation": variation(share[number][: tally.here[number]]),
        }
        for number, name in enumerate(names)
    ]
