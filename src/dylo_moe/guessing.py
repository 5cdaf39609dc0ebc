"""Two passes for about the price of one: beside a token's routed pass, the feature pass of a guessed next token runs as other
rows of the same batch. The guess is what the feature pass itself predicts, or what the text repeats (guesser.py).

Where the guess was right, the next token's routed pass can begin at once; where it was wrong, that token's feature pass runs
first, as it does without guesses. So no token depends on a guess, beyond the rounding of a batch of another size.

Shapes: B rows of the batch, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PretrainedConfig, PreTrainedModel

from dylo_moe.guesser import FOLLOWS, Guesser
from dylo_moe.mixture import Mixture
from dylo_moe.pair_cost import PairCost
from dylo_moe.paired_cache import PairedCache, can_pair
from dylo_moe.sampling import Choice, most_likely

# What a step may have been given; with anything else it runs in two passes.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}

# The chance of a right guess at first, and how fast it grows again where nothing is guessed: of guesses that are always wrong
# half a dozen are made, and then one in about twenty steps.
_FIRST_CHANCE = 0.9
_RECOVERS = 0.003


@dataclass(frozen=True)
class Guess:
    """The next step as it may come: ids (B, 1), positions (B or 1, 1), mask (B, columns), None where nothing is masked.

    features (B, 1, H), logits (B, V): what its feature pass has found, when it has run.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    features: Tensor | None = None
    logits: Tensor | None = None

    def is_right(self, step: dict[str, Any]) -> Tensor:
        """For each row, (B,)."""
        same = ((self.ids == step["input_ids"]) & (self.positions == step["position_ids"]))[:, 0]
        mask = step.get("attention_mask")
        if self.mask is None or mask is None:
            return same & (self.mask is mask)
        return same & (self.mask == mask).all(dim=1)


class Guesses:
    """Those of one generation, in which nobody changes a weight between two steps.

    Args:
        causal_lm: the model whose steps these are.
        mixture: what its layers mix.
        weight: of every expert in the feature pass, 0 or 1.
        cost: says when guesses pay.

    Attributes:
        made, right: steps that were guessed, for all rows of the batch together, and those that came as guessed.
        choose: how the next tokens will be chosen from their logits.
    """

    def __init__(self, causal_lm: PreTrainedModel, mixture: Mixture, weight: float, cost: PairCost) -> None:
        self.made = self.right = 0
        self.choose: Choice = most_likely
        self._causal_lm = causal_lm
        self._mixture = mixture
        self._weight = weight
        self._cost = cost
        self._chance = _FIRST_CHANCE
        self._repeats = 0.0  # the chance that all rows repeat themselves
        self._guesser = Guesser()
        self._paired: PairedCache | None = None
        self._expected: Guess | None = None  # this step, as the last one guessed it
        self._planned: Guess | None = None  # the next step, to be run beside this one
        self._is_running = False
        self._caught: list[Tensor] = []
        self._catching: RemovableHandle | None = None
        self._is_over = False  # somebody else works on the cache
        self._thread = threading.get_ident()
        self._positions = _first_positions(causal_lm.config)

    def features(self, step: dict[str, Any], half: Cache, run: Callable[[Cache], Tensor]) -> Tensor:
        """Features of this step's tokens, (B, 1, H): the guess's where it was right, else of a pass.

        Args:
            step: arguments of the forward pass, with its cache.
            half: the cache of a feature pass without guesses.
            run: the feature pass of this step, with such a cache.
        """
        expected, self._expected, self._planned = self._expected, None, None
        self._read(step)
        if not self._can_guess(step, int(half.get_seq_length())):
            self._paired = None
            return run(half)
        right = None if expected is None else expected.is_right(step)
        is_right = right is not None and self._count(bool(right.all()))
        pays = self._cost.pays(len(step["input_ids"]), self._chance)
        if not is_right and not pays:
            self._chance = max(min(1.0, self._chance + _RECOVERS), self._repeats)
            if self._paired is None:
                return run(half)
        if self._paired is None:
            self._paired = PairedCache(step["past_key_values"])
        features = expected.features if is_right else run(self._paired.feature_rows())
        self._paired.show_features()
        if pays:
            logits = expected.logits if is_right else self._logits(features)
            self._planned = self._guess(step, logits)
        return features

    def widened(self, weights: Tensor, step: dict[str, Any]) -> Tensor:
        """The weights of this step's routed rows, (B, 1, ...), and below them those of the guess that joins the step, if any."""
        guess = self._planned
        if self._paired is None:
            return weights
        self._is_running = True
        if guess is None:
            step["past_key_values"] = self._paired.routed_rows()
            return weights
        ids, masks = step["input_ids"], (step.get("attention_mask"), guess.mask)
        if guess.mask is None:
            masks = ids.new_ones(len(ids), self._paired.length + 1), ids.new_ones(len(ids), self._paired.length + 2)
        step["input_ids"] = torch.cat([ids, guess.ids])
        step["position_ids"] = torch.cat([step["position_ids"].expand_as(ids), guess.positions.expand_as(ids)])
        step["attention_mask"] = torch.cat([nn.functional.pad(masks[0], (1, 0)), masks[1]])
        step["past_key_values"] = self._paired.both_rows()
        self._catching = self._causal_lm.base_model.register_forward_hook(self._catch)
        return torch.cat([weights, torch.full_like(weights, self._weight)])

    def narrowed(self, output: Any) -> Any:
        """What the step's own rows gave; what the guess gave is kept. output: of the pass, None if it failed."""
        if not self._is_running:
            return output
        guess, self._planned, self._is_running = self._planned, None, False
        if guess is not None:
            self._catching.remove()
        if output is None:
            return None
        self._paired.show_routed()
        output.past_key_values = self._paired.cache
        if guess is not None:
            rows, hidden = len(guess.ids), self._caught.pop()
            self._expected = replace(guess, features=hidden[rows:], logits=output.logits[rows:, -1])
            output.logits = output.logits[:rows]
        return output

    def finish(self) -> None:
        """Lets go of the cache; the counts stay."""
        if self._catching is not None:
            self._catching.remove()  # a pass that Ctrl-C ended has not
        self._caught.clear()
        self._paired = self._expected = self._planned = None
        self._guesser, self.choose = Guesser(), most_likely
        self._is_over = True

    def _can_guess(self, step: dict[str, Any], length: int) -> bool:
        """length: tokens in the cache."""
        cache, ids, mask = step["past_key_values"], step.get("input_ids"), step.get("attention_mask")
        if self._paired is not None and not self._paired.is_intact(cache):
            self._is_over = True
        if self._is_over or self._causal_lm.training or self._causal_lm.get_output_embeddings() is None:
            return False
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if any(value is not None and value is not False for name, value in step.items() if name not in _INPUTS):
            return False
        if step.get("return_dict") is False or not isinstance(step.get("logits_to_keep", 0), int):
            return False
        if not isinstance(ids, Tensor) or ids.shape[1] != 1 or step.get("position_ids") is None:
            return False
        if step["position_ids"].shape not in (ids.shape, (1, 1)) or int(step["position_ids"].max()) + 1 >= self._positions:
            return False
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(ids), length + 1)):
            return False
        return self._paired is not None or can_pair(cache)

    def _count(self, is_right: bool) -> bool:
        self.made += 1
        self.right += is_right
        self._chance += FOLLOWS * (is_right - self._chance)
        return is_right

    def _logits(self, features: Tensor) -> Tensor:
        """What the feature pass predicts; features: (B, 1, H) -> (B, V)."""
        everyone = torch.full((1, 1, self._mixture.num_experts), self._weight, device=features.device)
        with self._mixture.using(everyone if self._weight else None):
            return self._causal_lm.get_output_embeddings()(features)[:, -1]

    def _read(self, step: dict[str, Any]) -> None:
        if not self._is_over and isinstance(step.get("input_ids"), Tensor):
            self._repeats += FOLLOWS * (self._guesser.read(step["input_ids"]) - self._repeats)

    def _guess(self, step: dict[str, Any], logits: Tensor) -> Guess:
        """logits: what the feature pass predicts, (B, V)."""
        ids = self._guesser.guess(self.choose(logits.to(step["input_ids"].device)))
        mask = step.get("attention_mask")
        mask = None if mask is None else nn.functional.pad(mask, (0, 1), value=1)
        return Guess(ids, step["position_ids"] + 1, mask)

    def _catch(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._caught.append(output.last_hidden_state)


def _first_positions(config: PretrainedConfig) -> float:
    """How many positions a pass computes as it would without a later one beside it.

    A table of positions ends; rotary frequencies that depend on the length of the text ("dynamic", "longrope") are all rows'.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "max_position_embeddings", None)]
    for kind in (rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))):
        if kind.get("rope_type") == "longrope":
            limits += [kind.get("original_max_position_embeddings"), getattr(text, "original_max_position_embeddings", None)]
    return min((limit for limit in limits if limit is not None), default=math.inf)
