"""Where mixing in the layers (one pass) and mixing logits (a pass per expert, DyLoRA-MoE's first generation) are the same.

They are equal when, and only when, one of four things holds; each is a law here. Elsewhere the difference is drift:
reported, never hidden in a tolerance. B rows, S tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from harness.artifact import Adapter
from harness.bench import Bench
from harness.compare import as_float64, assert_within
from harness.oracles.router import softmax
from harness.outcome import NotApplicable
from harness.reference import load_reference
from harness.workings import Workings, workings

DRIFT_STEPS = 4


def check_constant_one_hot_equals_multi_pass(bench: Bench) -> None:
    """One-hot weights that do not change over the sequence: one pass equals the weighted passes.

    Reason: both are then the pass of one expert.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts()
    for expert in {0, w.experts - 1}:
        weights = torch.zeros_like(w.dense)
        weights[..., expert] = 1
        want = w.reference.multi_pass_logits(w.ids, w.mask, as_float64(weights))
        w.same_logits(w.ask(w.model, routing_weights=weights), want, f"expert {expert} everywhere")


def check_equal_experts_equal_multi_pass(bench: Bench) -> None:
    """All experts equal and weights summing to 1: one pass equals the weighted passes.

    Reason: every mixture of one thing with itself is that thing, in the layers as in the logits.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts(2)
    path = w.variant_for_weights([w.reference.experts[0]] * w.experts)
    want = load_reference(path).multi_pass_logits(w.ids, w.mask, as_float64(w.dense))
    w.same_logits(w.ask(w.load(path), routing_weights=w.dense), want, "equal experts")


def check_zero_deltas_equal_multi_pass(bench: Bench) -> None:
    """All deltas zero and weights summing to 1: one pass equals the weighted passes, and both are the base (and shared adapter).

    Reason: experts as LoRA initialises them, B = 0, must leave the base alone.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts()
    silent = [
        {m: Adapter(a.lora_A, np.zeros_like(a.lora_B), a.scaling) for m, a in expert.items()} for expert in w.reference.experts
    ]
    path = w.variant_for_weights(silent)
    got = w.ask(w.load(path), routing_weights=w.dense)
    want = load_reference(path).multi_pass_logits(w.ids, w.mask, as_float64(w.dense))
    w.same_logits(got, want, "zero deltas, against the passes")
    alone = w.reference.base_logits(w.ids, w.mask)
    if w.reference.artifact.shared:
        alone = load_reference(path).logits(w.ids, w.mask, expert_id=0)
    w.same_logits(got, alone, "zero deltas, against the base")


def check_readout_adapters_equal_multi_pass(bench: Bench) -> None:
    """Adapters in the final readout alone: one pass equals the weighted passes, for weights that are constant over the sequence.

    Reason: the readout is linear and nothing follows it, so mixing before and after it is the same.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts(2)
    weights = w.dense[:, :1].expand_as(w.dense)
    w.need_units_to_be_linears()
    path = w.variant_for_weights(_readout_experts(w))
    model = w.load(path)
    reference = load_reference(path)
    want = reference.multi_pass_logits(w.ids, w.mask, as_float64(weights))
    effect = np.abs(want - reference.base_logits(w.ids, w.mask))[w.valid].max()
    got = as_float64(w.ask(model, routing_weights=weights))
    assert_within(got[w.valid], want[w.valid], w.bound, effect=effect, what="adapters on the readout")


def check_drift(bench: Bench) -> None:
    """How far one pass with the router's weights is from one pass per expert, reported as drift.

    Reason: a checkpoint trained with one mixing and served with the other is another model; this says how much.
    Tolerance: none; the numbers, from the reference, are evidence, and a budget for them is the user's to set.
    """
    w = workings(bench)
    w.need_experts()
    if getattr(w.reference.router, "hands_on", False):
        raise NotApplicable("the checkpoint's own router hands the input of MLPs on: its weights alone are not what it does")
    weights = w.dense if w.reference.router is None else torch.from_numpy(_router_weights(w))
    one = w.reference.logits(w.ids, w.mask, weights=weights)[w.valid]
    many = w.reference.multi_pass_logits(w.ids, w.mask, as_float64(weights))[w.valid]
    p, q = softmax(one), softmax(many)
    bench.evidence(
        drift={
            "logit_difference_max": float(np.abs(one - many).max()),
            "logit_difference_mean": float(np.abs(one - many).mean()),
            "kl_divergence_mean": float((p * (np.log(p) - np.log(q))).sum(axis=-1).mean()),
            "top1_agreement": float((one.argmax(axis=-1) == many.argmax(axis=-1)).mean()),
            "greedy_token_agreement": _greedy_agreement(w),
        }
    )


def _router_weights(w: Workings) -> np.ndarray:
    """(B, S, E); a router per layer is averaged over the layers, because the passes know no layers."""
    weights = w.reference.routing_weights(w.ids, w.mask)
    return weights.mean(axis=2) if weights.ndim == 4 else weights


def _greedy_agreement(w: Workings) -> float:
    """Share of greedy tokens that both mixings choose, each continuing the text of the single pass."""
    same = total = 0
    for prompt in w.bench.prompts[:2]:
        so_far = prompt.cpu()[None]
        for _ in range(DRIFT_STEPS):
            ones = torch.ones_like(so_far)
            weights = torch.full((*so_far.shape, w.experts), 1 / w.experts, dtype=torch.float64)
            if w.reference.router is not None:
                found = w.reference.routing_weights(so_far)
                weights = torch.from_numpy(found.mean(axis=2) if found.ndim == 4 else found)
            single = int(w.reference.logits(so_far, weights=weights)[0, -1].argmax())
            same += single == int(w.reference.multi_pass_logits(so_far, ones, weights.numpy())[0, -1].argmax())
            total += 1
            so_far = torch.cat([so_far, torch.tensor([[single]])], dim=1)
    return same / total


def _readout_experts(w: Workings) -> list[dict[str, Adapter]]:
    """Random rank-2 experts on the readout, a tenth of its size."""
    model = w.reference.model.base
    readout = model.get_output_embeddings()
    if model.config.tie_word_embeddings or not isinstance(getattr(readout, "base_layer", readout), nn.Linear):
        raise NotApplicable("the readout is tied to the embeddings")
    name = next(name for name, module in model.named_modules() if module is readout)
    outputs, inputs = getattr(readout, "base_layer", readout).weight.shape
    rng = w.bench.rng(4)
    draw = lambda *shape: (rng.standard_normal(shape) / inputs**0.5).astype(np.float32).astype(np.float64)  # noqa: E731
    return [{name: Adapter(draw(2, inputs), draw(outputs, 2), 1.0)} for _ in range(w.experts)]
