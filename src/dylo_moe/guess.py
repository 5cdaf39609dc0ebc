"""One guessed step of a generation, and the inputs of passes with guesses.

Shapes: B rows of the batch, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Guess:
    """A step as it may come: ids (B, 1), positions (B or 1, 1), mask (B, columns), None where nothing is masked.

    features (B, 1, H), logits (B, V): what a feature pass beside another step has found. output: what a routed pass has found.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    features: Tensor | None = None
    logits: Tensor | None = None
    output: Any = None

    @classmethod
    def after(cls, step: dict[str, Any], place: int, ids: Tensor) -> Guess:
        """The step that comes `place` steps after this one, with these ids (B, 1)."""
        mask = step.get("attention_mask")
        return cls(ids, step["position_ids"] + place, None if mask is None else pad(mask, (0, place), value=1))

    def is_right(self, step: dict[str, Any]) -> Tensor:
        """For each row, (B,)."""
        same = ((self.ids == step["input_ids"]) & (self.positions == step["position_ids"]))[:, 0]
        mask = step.get("attention_mask")
        if self.mask is None or mask is None:
            return same & (self.mask is mask)
        return same & (self.mask == mask).all(dim=1)


def with_guesses_behind(step: dict[str, Any], guesses: Sequence[Guess]) -> dict[str, Any]:
    """Inputs of a pass over the step and then the guesses, (B, 1 + guesses)."""
    if not guesses:
        return step
    mask, positions = step.get("attention_mask"), step["position_ids"].expand_as(step["input_ids"])
    inputs = {
        "input_ids": torch.cat([step["input_ids"], *(guess.ids for guess in guesses)], dim=1),
        "position_ids": torch.cat([positions, *(guess.positions.expand_as(positions) for guess in guesses)], dim=1),
        "attention_mask": None if mask is None else pad(mask, (0, len(guesses)), value=1),
    }
    return {**step, **inputs, **({"logits_to_keep": 0} if "logits_to_keep" in step else {})}


def with_guess_below(step: dict[str, Any], guess: Guess, length: int) -> dict[str, Any]:
    """Inputs of a pass with the step in the first B rows and the guess in the others, (2B, 1), masked as PairedCache wants it.

    length: tokens in the cache, before this step.
    """
    ids, masks = step["input_ids"], (step.get("attention_mask"), guess.mask)
    if guess.mask is None:
        masks = ids.new_ones(len(ids), length + 1), ids.new_ones(len(ids), length + 2)
    inputs = {
        "input_ids": torch.cat([ids, guess.ids]),
        "position_ids": torch.cat([step["position_ids"].expand_as(ids), guess.positions.expand_as(ids)]),
        "attention_mask": torch.cat([pad(masks[0], (1, 0)), masks[1]]),
    }
    return {**step, **inputs}
