"""When guesses pay, and of how many tokens: what passes cost on this machine, by rows."""

from __future__ import annotations

import math
import time
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Tokens of a pass with guesses.
WIDTHS = (2, 3, 4, 6, 8, 16)
# In passes of one token of a batch, where that does not have to be measured.
_TWO_PASSES = 2.0
_BY_BYTES = 1.2  # reading the weights is nearly all of it
_MANY_ROWS = {"cpu": 8, "cuda": 32}  # beyond these it is not
# Rows of bfloat16 on a processor that has no such products, from the second on: measured.
_FIRST_ROWS, _EACH_ROW = 1.3, 0.24
_HARDLY_REPEATS = 0.2  # several guesses are not tried
# Numbers of weights that a measurement reads: more than a processor keeps.
_SAMPLE = 2**24
_REPEATS = 3


class PairCost:
    """Of one model; what was measured is kept.

    On a CPU the cost of a product hardly follows from counted work: two rows cost one or two, by vendor and library. So it is
    measured, but not in 16 bits, where rounding can be seen in the tokens: these must not hang on a clock.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self._causal_lm = causal_lm
        self._measured: dict[tuple[int, int, torch.dtype, int], float] = {}

    def width(self, rows: int, chance: float, repeats: float, widest: int) -> int:
        """How many tokens the next passes should take, so that a token costs least.

        0: one, in two passes. 1: one, in a pass that finds the features of a guessed next one beside it. More: the next one and
        guesses of those after it, in a feature pass and then a routed one.

        Args:
            rows: of the batch.
            chance: that the next token is guessed rightly.
            repeats: that a token is what the text repeats, which is all that several guesses can be made from.
            widest: how many tokens they may take.
        """
        # A wrong guess costs the feature pass again, and its prediction.
        costs = {0: _TWO_PASSES, 1: self._wide(rows, 2) + (1 - chance) * (1 + self._head_share)}
        for width in WIDTHS if repeats > _HARDLY_REPEATS else ():
            if width <= widest:
                costs[width] = 2 * self._wide(rows, width) / tokens_of_use(width, repeats)
        return min(costs, key=costs.get)

    def _wide(self, rows: int, times: int) -> float:
        """A pass over so many times the rows; infinite where it is not known to cost less than as many passes."""
        weight, all_rows = next(self._causal_lm.get_output_embeddings().parameters(), None), times * rows
        if weight is None:
            return math.inf
        if weight.device.type != "cpu":
            return _BY_BYTES if all_rows <= _MANY_ROWS["cuda"] else math.inf
        if weight.dtype in (torch.float32, torch.float64):
            return max(_BY_BYTES, self._ratio(weight.dtype, rows, all_rows))
        if weight.dtype != torch.bfloat16 or all_rows > _MANY_ROWS["cpu"]:
            return math.inf
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return _BY_BYTES
        return _of_bfloat16(all_rows) / _of_bfloat16(rows) if torch.cpu._is_avx512_supported() else math.inf

    def _ratio(self, dtype: torch.dtype, rows: int, all_rows: int) -> float:
        key = (rows, all_rows, dtype, torch.get_num_threads())
        if key not in self._measured:
            self._measured[key] = _measure([weight for weight in self._sample() if weight.dtype == dtype], rows, all_rows)
        return self._measured[key]

    def _sample(self) -> list[Tensor]:
        """Some weights of the model's Linears."""
        sample, numbers = [], 0
        for module in self._causal_lm.base_model.modules():
            if type(module) is nn.Linear and numbers < _SAMPLE:
                sample.append(module.weight)
                numbers += module.weight.numel()
        return sample

    @cached_property
    def _head_share(self) -> float:
        """Of the readout in the weights that a pass reads without it."""
        model = self._causal_lm
        readout, embeddings = _numbers(model.get_output_embeddings()), _numbers(model.get_input_embeddings())
        return readout / max(1, _numbers(model.base_model) - embeddings)


def tokens_of_use(width: int, chance: float) -> float:
    """Of those that a pass routes, in the mean: the first, and each other one if all guesses up to it are right."""
    return sum(chance**place for place in range(width))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _of_bfloat16(rows: int) -> float:
    """A product of so many rows, in products of one."""
    return 1.0 if rows == 1 else _FIRST_ROWS + _EACH_ROW * rows


def _measure(weights: list[Tensor], rows: int, all_rows: int) -> float:
    """Time of products with all rows over that with `rows`, of the fastest of a few."""
    if not weights:
        return math.inf
    fastest = {rows: math.inf, all_rows: math.inf}
    for _ in range(_REPEATS):
        for count in fastest:
            start = time.process_time()
            for weight in weights:
                nn.functional.linear(weight[:1].expand(count, -1).contiguous(), weight)
            fastest[count] = min(fastest[count], time.process_time() - start)
    return fastest[all_rows] / fastest[rows] if fastest[rows] else math.inf  # a clock too coarse to say
