"""Laws of generation that no single greedy text shows: sampling, rows that end apart, what stands under the mask."""

from __future__ import annotations

from functools import partial

import torch

from harness.bench import Bench
from harness.compare import assert_equal
from harness.outcome import Void
from harness.texts import COLD, filled, generating, greedily, next_logits, same_text
from harness.workings import Workings


def check_cold_sampling_is_greedy(bench: Bench) -> None:
    """Sampled at a temperature near 0, the router and each expert alone write what they write greedily.

    Reason: sampling often goes another way through the code, where the strategy or the temperature is lost.
    Tolerance: none but a near tie, of logits or of the routing.
    """
    w = generating(bench)
    w.need_option(w.model.generate, "temperature")
    options = {"do_sample": True, "temperature": COLD, "top_k": 0, "top_p": 1.0}
    for strategy in _strategies(w):
        prompt = bench.prompts[0]
        _compare(w, strategy, _alone(w, strategy, prompt, **options), prompt, _alone(w, strategy, prompt))


def check_rows_may_end_apart(bench: Bench) -> None:
    """Where a row of a batch ends early, the others go on as they do alone; what stands under the mask changes no text.

    Reason: a row that has left a batch takes its place in caches and routes along, and the next row gets its neighbour's.
    Tolerance: none but a near tie, of logits or of the routing.
    """
    w = generating(bench)
    ids, mask = bench.batch("left")
    for strategy in _strategies(w):
        alone = [_alone(w, strategy, prompt) for prompt in bench.prompts]
        end = _early(alone)
        rows = w.model.generate(filled(ids, mask, bench), mask, strategy=strategy, **{**greedily(w), "eos_token_id": end})
        for prompt, row, text in zip(bench.prompts, rows[:, ids.shape[1] :].tolist(), alone, strict=True):
            got = _until(row, end)
            assert_equal(set(row[len(got) :]) - {0}, set(), what="tokens other than padding after the end of a row")
            _compare(w, strategy, got, prompt, _until(text, end))


def check_independent_of_the_one_before(bench: Bench) -> None:
    """A generation writes what it wrote before others, by other strategies, came between.

    Reason: upstream's generate() depended on the call before it; an expert, a cache or a choice that is kept looks the same.
    Tolerance: none; the same operations on the same numbers.
    """
    w = generating(bench)
    others = [name for name in ("best", "ensemble", "single:0") if w.can(name.partition(":")[0])]
    first, second = bench.prompts[2:]
    for strategy in _strategies(w):
        before = _alone(w, strategy, first)
        for other in others:
            _alone(w, other, second)
            assert_equal(_alone(w, strategy, first), before, what=f"text of {strategy} after one of {other}")


def _strategies(w: Workings) -> list[str]:
    routed = w.reference.router is not None and not w.sees_whole_batch and w.can("router")
    return ["router"] * routed + [f"single:{w.experts - 1}"]


def _alone(w: Workings, strategy: str, prompt: torch.Tensor, **options: object) -> list[int]:
    row = w.model.generate(prompt[None], torch.ones_like(prompt)[None], strategy=strategy, **{**greedily(w), **options})
    return row[0, len(prompt) :].tolist()


def _early(texts: list[list[int]]) -> int:
    """A token with which one text ends early, and another, at least, does not."""
    for place in (1, 0, 2):
        for text in texts:
            if len(text) > place and any(text[place] not in other[: place + 1] for other in texts):
                return text[place]
    raise Void("no token ends one row before the others")


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _compare(w: Workings, strategy: str, got: list[int], prompt: torch.Tensor, want: list[int]) -> None:
    __tracebackhide__ = True
    if strategy == "router" and w.near_tie(torch.cat([prompt.cpu(), torch.tensor(want)])[None], None).any():
        return
    expert = int(strategy.partition(":")[2]) if ":" in strategy else None
    same_text(w, got, want, prompt, partial(next_logits, w, expert), margin=max(2 * w.bound, 50 * COLD))
