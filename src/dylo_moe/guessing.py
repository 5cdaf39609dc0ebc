"""Two passes for about the price of one: beside a token's routed pass, the feature pass of a guessed next token runs as other
rows of the same batch. The guess is what the feature pass itself predicts, or what the text repeats (guesser.py).

Where the guess was right, the next token's routed pass can begin at once; where it was wrong, that token's feature pass runs
first, as it does without guesses. Where the text repeats itself, both passes take several guessed tokens behind the next one, and
the steps of those that were right are answered without a pass. So no token depends on a guess, beyond the rounding of a batch of
another size.

Rows of wrong guesses are at most as many as tokens, and half as many as the prompt's: up to three rows of work for a token, where
two passes do two.

Shapes: B rows of the batch, V vocabulary, H hidden size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from dylo_moe.guess import Guess, with_guess_below, with_guesses_behind
from dylo_moe.guessable import alike_positions
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
        self._spare: int | None = None  # how many rows more may be wrong
        self._guesser = Guesser()
        self._paired: PairedCache | None = None
        self._ahead: deque[Guess] = deque()  # the next steps, routed already or the next one's features
        self._chain: list[Guess] = []  # the next steps, to be routed behind this one
        self._planned: Guess | None = None  # the next step, whose feature pass is to be run beside this one
        self._answer: Any = None  # the output of this step, where it is known
        self._is_ready = False  # the features of the pass under way were asked for
        self._is_running = False
        self._caught: list[Tensor] = []
        self._catching: RemovableHandle | None = None
        self._is_over = False  # somebody else works on the cache
        self._thread = threading.get_ident()
        self._positions = alike_positions(causal_lm.config)
        self._has_begun = False

    def features(self, step: dict[str, Any], half: Cache, run: Callable[[dict[str, Any], Cache], Tensor]) -> Tensor:
        """Features of this step's token, (B, 1, H), and behind them those of the guesses that are routed with it, if any.

        Args:
            step: arguments of the forward pass, with its cache.
            half: the cache of a feature pass without guesses.
            run: the feature pass of these arguments, with such a cache.
        """
        expected = self._ahead.popleft() if self._ahead else None
        self._chain, self._planned, self._answer, self._is_ready = [], None, None, False
        self._read(step)
        length = int(half.get_seq_length())
        # A cache that was given may be in another dtype, until a pass as transformers runs it has written to it.
        has_begun, self._has_begun = self._has_begun, True
        if not (has_begun and self._can_guess(step, length)):
            self._paired = None
            self._ahead.clear()
            return run(step, half)
        self._spare = (length // 2 if self._spare is None else self._spare) + 1
        if expected is not None and self._count(bool(expected.is_right(step).all())):
            return self._foreseen(step, expected)
        self._ahead.clear()
        width = self._width(step)
        if not width:
            self._chance = max(min(1.0, self._chance + _RECOVERS), self._repeats)
            if self._paired is None:
                return run(step, half)
        if self._paired is None:
            self._paired = PairedCache(step["past_key_values"])
        return self._found(step, width, run)

    def _foreseen(self, step: dict[str, Any], expected: Guess) -> Tensor:
        """Features of a step that came as guessed."""
        self._is_ready = True
        self._paired.show_features()
        self._answer = expected.output
        self._spare += 1 if expected.output is None else 2
        if expected.output is None and self._width(step) == 1:
            self._planned = self._guess(step, expected.logits)
        return expected.features

    def _found(self, step: dict[str, Any], width: int, run: Callable[[dict[str, Any], Cache], Tensor]) -> Tensor:
        """Features of a step that was not guessed, or wrongly, by a pass that takes along what the text may repeat."""
        self._is_ready = True
        chain = self._repeated(step, width - 1) if width > 1 else []
        features = run(with_guesses_behind(step, chain), self._paired.feature_rows(1 + len(chain)))
        self._paired.show_features()
        self._chain = [replace(guess, features=features[:, place : place + 1]) for place, guess in enumerate(chain, 1)]
        self._spare -= 2 * len(chain)
        if width and not chain:
            self._planned = self._guess(step, self._logits(features))
        return features

    def answer(self) -> Any:
        """The output of this step, None where it takes a pass."""
        return self._answer if self._is_running else None

    def widened(self, weights: Tensor, step: dict[str, Any]) -> Tensor:
        """The weights of this step's routed rows, (B, n, ...), and below them those of the guess that joins it, if any."""
        if not self._is_ready:  # a pass without a cache, beside the steps
            return weights
        self._is_ready, self._is_running = False, True
        if self._answer is not None:
            return weights
        if self._planned is None:
            step.update(with_guesses_behind(step, self._chain))
            step["past_key_values"] = self._paired.routed_rows(1 + len(self._chain))
            return weights
        step.update(with_guess_below(step, self._planned, self._paired.length))
        step["past_key_values"] = self._paired.both_rows()
        self._catching = self._causal_lm.base_model.register_forward_hook(self._catch)
        return torch.cat([weights, torch.full_like(weights, self._weight)])

    def narrowed(self, output: Any) -> Any:
        """What the step's own token gave; what the guesses gave is kept. output: of the pass, None if it failed."""
        if not self._is_running:
            return output
        self._is_running = False
        if self._planned is not None:
            self._catching.remove()
        if output is None:
            return None
        self._paired.show_routed()
        output.past_key_values = self._paired.cache
        if self._answer is None:
            self._keep(output)
        return output

    def _keep(self, output: Any) -> None:
        """output: of the pass; its logits become those of the step alone."""
        logits, rows = output.logits, len(output.logits)
        for place, guess in enumerate(self._chain, 1):
            known = type(output)(logits=logits[:, place : place + 1], past_key_values=output.past_key_values)
            self._ahead.append(replace(guess, output=known))
        if self._planned is not None:
            rows, hidden = rows // 2, self._caught.pop()
            self._ahead.append(replace(self._planned, features=hidden[rows:], logits=logits[rows:, -1]))
        output.logits = logits[:rows, :1]

    def forget(self) -> None:
        """A weight has changed: what was found with it is of no use."""
        self._ahead.clear()

    def settle(self) -> None:
        """The cache is its owner's again."""
        if self._paired is not None:
            self._paired.settle()

    def finish(self) -> None:
        """Lets go of the cache; the counts stay."""
        if self._catching is not None:
            self._catching.remove()  # a pass that Ctrl-C ended has not
        self._caught.clear()
        self._ahead.clear()
        self._chain, self._planned, self._answer, self._paired = [], None, None, None
        self._guesser, self.choose = Guesser(), most_likely
        self._is_over = True

    def _can_guess(self, step: dict[str, Any], length: int) -> bool:
        """length: tokens in the cache."""
        cache, ids, mask = step["past_key_values"], step.get("input_ids"), step.get("attention_mask")
        if self._paired is not None and not self._paired.is_intact(cache):
            self._is_over = True
        if self._is_over or self._causal_lm.get_output_embeddings() is None:
            return False
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if any(value is not None and value is not False for name, value in step.items() if name not in _INPUTS):
            return False
        if step.get("return_dict") is False or not isinstance(step.get("logits_to_keep", 0), int):
            return False
        if not isinstance(ids, Tensor) or ids.shape[1] != 1 or step.get("position_ids") is None:
            return False
        if step["position_ids"].shape not in (ids.shape, (1, 1)):
            return False
        if self._room(step, length) < 1:
            return False
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(ids), length + 1)):
            return False
        return self._paired is not None or can_pair(cache)

    def _room(self, step: dict[str, Any], length: int) -> float:
        """Tokens that may come after this step. Tables are of positions, in some models of columns, which padding has too."""
        return self._positions - 1 - max(int(step["position_ids"].max()), length)

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
        """The next step. logits: what the feature pass predicts, (B, V)."""
        self._spare -= 1
        return Guess.after(step, 1, self._guesser.guess(self.choose(logits.to(step["input_ids"].device))))

    def _repeated(self, step: dict[str, Any], count: int) -> list[Guess]:
        """The next steps, `count` or fewer, if the text repeats itself."""
        columns = step["input_ids"].new_tensor(self._guesser.repeat(min(count, self._room(step, self._paired.length)))).T
        return [Guess.after(step, place, ids[:, None]) for place, ids in enumerate(columns, 1)]

    def _width(self, step: dict[str, Any]) -> int:
        return self._cost.width(len(step["input_ids"]), self._chance, self._repeats, 1 + self._spare // 2)

    def _catch(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._caught.append(output.last_hidden_state)
