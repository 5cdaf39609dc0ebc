"""Laws of a whole model in half precision; those of single layers are in layer.py."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from harness.bench import Bench
from harness.compare import UNIT_ROUNDOFF, as_float64, assert_within
from harness.loop import LoopModel
from harness.workings import Workings, workings

# float16 is only asked of models with fewer parameters: many processors have no such products and take minutes for each.
SMALL = 100_000_000
# Two scores that are each off by twice the loop's error change places if they are nearer than this many times that error.
TIE_IN_ERRORS = 4


def check_whole_model_error_at_most_twice_loop(bench: Bench) -> None:
    """In bfloat16 and float16 the logits are as near to the reference's as a plain loop's, with weights given and routed.

    Reason: models run in half precision, where kernels, casts and routers of their own take part that float32 never meets.
    Tolerance: twice the loop's root mean square error, plus a rounding; only tokens whose routing is no near tie in that dtype.
    """
    w = workings(bench)
    w.need_experts()
    small = sum(p.numel() for p in w.model.parameters()) < SMALL
    for dtype in (torch.bfloat16, torch.float16) if small else (torch.bfloat16,):
        loop = copy.deepcopy(w.naive).to(dtype)
        if not torch.isfinite(w.ask(loop, w.ids.cpu(), w.mask.cpu(), routing_weights=w.dense.cpu())[w.mask.cpu().bool()]).all():
            continue  # the base model itself overflows
        model = w.load(dtype=str(dtype).removeprefix("torch."))
        want = w.reference.logits(w.ids, w.mask, weights=w.dense)
        _compare(w, (model, loop), want, w.valid, f"given weights in {dtype}", routing_weights=w.dense)
        where = _decided(w, loop)
        if where.any():
            _compare(w, (model, loop), w.reference_logits, where, f"routed in {dtype}")


def _compare(w: Workings, models: tuple, want: np.ndarray, where: np.ndarray, what: str, **routing: Tensor) -> None:
    __tracebackhide__ = True
    model, loop = models
    got = as_float64(w.ask(model, w.ids, w.mask, **routing))[where]
    plain = as_float64(w.ask(loop, w.ids.cpu(), w.mask.cpu(), **{name: value.cpu() for name, value in routing.items()}))[where]
    want = want[where]
    allowed = 2 * _rms(plain - want) + UNIT_ROUNDOFF[loop.dtype] * _rms(want)
    assert_within(_rms(got - want), 0.0, allowed, what=f"root mean square error of the logits, {what}")


def _decided(w: Workings, loop: LoopModel) -> np.ndarray:
    """(B, S): tokens whose routing, and that of all before them, no rounding to this dtype can change."""
    if w.reference.router is None or w.reference.router.features == "layer":
        return np.zeros_like(w.valid)  # what a layer routes by depends on how those before it were routed
    seen = loop.router_scores(w.ids.cpu(), w.mask.cpu())
    exact = w.reference.router_scores(w.ids, w.mask)
    error = max(np.abs(as_float64(got) - want)[w.valid].max() for got, want in zip(seen, exact, strict=True))
    near = w.reference.router_margin(w.ids, w.mask) < TIE_IN_ERRORS * error
    return w.valid & ~np.logical_or.accumulate(near & w.valid, axis=1)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
