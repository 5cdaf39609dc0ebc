"""Laws of inputs that usual ones do not stand for: long texts, one token, no mask, tokens under the mask, weights of any sum.

An implementation often has a way of its own for each of them, and a fault in one shows in no other.
B rows, S tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.bench import Bench
from harness.compare import as_float64, assert_within, twice_the_loop
from harness.texts import filled
from harness.workings import Workings, workings

LONG = 150  # tokens, where the model has so many positions; longer than what is worth one product for each expert


def check_long_text(bench: Bench) -> None:
    """A text of many tokens gives the reference's logits, for a mixture that is given and with the router in charge.

    Reason: what costs least depends on the number of tokens; the way that many of them take is another than that of few.
    Tolerance: twice the naive loop's error on the same text.
    """
    w = workings(bench)
    w.need_experts()
    ids = _long(w)
    weights = torch.from_numpy(bench.rng(11).dirichlet(np.ones(w.experts), size=(1, ids.shape[1])).astype(np.float32))
    everywhere = np.ones(tuple(ids.shape), dtype=bool)
    if w.reference.router is None or w.has_option(w.model.forward, "routing_weights"):
        _compare_with_loop(w, ids, everywhere, w.reference.logits(ids, weights=weights), routing_weights=weights)
    if w.reference.router is not None:
        decided = ~np.logical_or.accumulate(w.near_tie(ids, None), axis=1)
        bench.evidence(tokens_routed=int(decided.sum()))
        if decided.any():
            _compare_with_loop(w, ids, decided, w.reference.logits(ids))


def _compare_with_loop(w: Workings, ids: Tensor, where: np.ndarray, want: np.ndarray, **routing: Tensor) -> None:
    """The bound is the usual one, or what the loop's error on these very inputs makes of it, if that is more."""
    __tracebackhide__ = True
    loop = as_float64(w.ask(w.naive, ids.cpu(), None, **routing))[where]
    bound = max(w.bound if routing else w.routed_bound, twice_the_loop(loop, want[where], w.dtype))
    got = w.ask(w.model, ids, None, **{name: value.to(ids.device) for name, value in routing.items()})
    what = f"{'given' if routing else 'routed'} mixture over {ids.shape[1]} tokens"
    assert_within(as_float64(got)[where], want[where], bound, effect=w.effect, what=what)


def check_weights_of_any_sum(bench: Bench) -> None:
    """Weights that do not sum to 1, some of them below 0, are used as they are given.

    Reason: X-LoRA's scalings sum to anything; a model that clips or normalises what it is given is right for all others.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    w.need_experts()
    weights = w.dense / 2 - 1 / 8
    want = w.reference.logits(w.ids, w.mask, weights=weights)
    loop = as_float64(w.ask(w.naive, w.ids.cpu(), w.mask.cpu(), routing_weights=weights.cpu()))
    bound = max(w.bound, twice_the_loop(loop[w.valid], want[w.valid], w.dtype))
    w.same_logits(w.ask(w.model, routing_weights=weights), want, "logits", bound=bound)


def check_masked_tokens_do_not_count(bench: Bench) -> None:
    """Whatever tokens stand under the attention mask, the others' logits are the same.

    Reason: a mask that is guessed from the padding token's id is wrong as soon as a text holds that token.
    Tolerance: twice the naive loop's error for each of the two passes.
    """
    w = workings(bench)
    w.need_experts()
    w.need_tokens_alone()
    got = as_float64(w.ask(w.model, filled(w.ids, w.mask, bench), w.mask))
    want, where = as_float64(w.subject_logits), w.decided
    assert_within(got[where], want[where], 2 * w.routed_bound, effect=w.effect, what="logits with other tokens under the mask")


def check_texts_cut_short(bench: Bench) -> None:
    """The first token alone, the first four, and a text without a mask give what they give in a longer text and with one.

    Reason: a pass of one token is taken for a step of a generation, and is then routed as the token before it.
    Tolerance: twice the naive loop's error for each of the two passes.
    """
    w = workings(bench)
    w.need_experts()
    w.need_tokens_alone()
    prompt = bench.prompts[0]
    together, where = as_float64(w.subject_logits)[0, -len(prompt) :], w.decided[0, -len(prompt) :]
    for length in (1, 4, len(prompt)):
        kept = where[:length]
        mask = None if length == len(prompt) else torch.ones_like(prompt)[None, :length]
        got = as_float64(w.ask(w.model, prompt[None, :length], mask))[0]
        if kept.any():
            what = f"logits of {length} tokens{'' if mask is not None else ' without a mask'}"
            assert_within(got[kept], together[:length][kept], 2 * w.routed_bound, effect=w.effect, what=what)


def _long(w: Workings) -> Tensor:
    """One row, (1, S)."""
    config = w.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = min(LONG, getattr(config, "max_position_embeddings", None) or LONG)
    drawn = w.bench.rng(10).integers(min(8, w.bench.vocab_size // 2), w.bench.vocab_size, size=(1, length))
    return torch.as_tensor(drawn, device=w.bench.device)
