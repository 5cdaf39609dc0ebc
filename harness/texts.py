"""How laws ask for a text and compare it with another one, token for token up to a genuine near tie.

P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harness.bench import Bench
from harness.compare import assert_equal, assert_same_tokens
from harness.workings import Workings, workings

NEW_TOKENS = 6
# A temperature at which sampling takes a token whose logit is 50 times this below the best once in e^50 draws.
COLD = 1e-6


def generating(bench: Bench, strategy: str = "single") -> Workings:
    """The workings of a bench whose subject generates by this strategy; NotApplicable otherwise."""
    w = workings(bench)
    w.need_experts()
    w.need_method(w.model, "generate")
    w.need_strategy(strategy)
    return w


def greedily(w: Workings) -> dict[str, object]:
    """Options of a greedy generation."""
    return {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}


def next_logits(w: Workings, expert: int | None, ids: Tensor) -> np.ndarray:
    """The reference's logits after a text, of one expert or, for None, of its router's choice."""
    return w.reference.logits(ids[None], expert_id=expert)[0, -1]


def same_text(
    w: Workings, got: list[int], want: list[int], prompt: Tensor, score: Callable[[Tensor], np.ndarray], *, margin: float = 0.0
) -> None:
    """`score` gives the reference's logits or probabilities after a text; it decides whether a first difference is a near tie."""
    __tracebackhide__ = True
    got, want = until_end(w, got), until_end(w, want)
    step = next((t for t, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
    if step is None:
        assert_equal(len(got), len(want), what=f"number of tokens after the prompt of {len(prompt)}")
        return
    scores = score(torch.cat([prompt.cpu(), torch.tensor(want[:step], dtype=torch.long)]))
    rows = np.zeros((step + 1, len(scores)))
    rows[step] = scores
    assert_same_tokens(
        got, want, got_logits=rows, want_logits=rows, margin=2 * w.bound if margin is None else margin, what="text"
    )


def until_end(w: Workings, tokens: list[int]) -> list[int]:
    """Up to and including the first end-of-text token; what follows is padding."""
    ends = w.model.config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def filled(ids: Tensor, mask: Tensor, bench: Bench) -> Tensor:
    """The same rows with ordinary tokens under the mask."""
    return torch.where(mask.bool(), ids, bench.prompts[0][:1])
