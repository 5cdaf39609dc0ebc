"""When it pays to run a feature pass on a guess: what passes cost on this machine, by rows."""

from __future__ import annotations

import time
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# A pass of 2 n rows, in passes of n rows, where that does not have to be measured. Never: it is two passes.
_NEVER = 2.0
_BY_BYTES = 1.2  # reading the weights is nearly all of it
_CHEAP = 1.4  # products that are measured below this are so
_FEW_ROWS = {"cpu": 4, "cuda": 16}
_WITHOUT_BFLOAT16 = 1.7  # one row of bfloat16 on a processor that has no such products; measured
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
        self._measured: dict[tuple[int, torch.dtype, int], float] = {}

    def pays(self, rows: int, chance: float) -> bool:
        """Whether steps of so many rows, each guessed rightly with this chance, cost less than two passes each.

        A wrong guess costs the feature pass again, and its prediction.
        """
        return self.pair(rows) + (1 - chance) * (1 + self._head_share) < _NEVER

    def pair(self, rows: int) -> float:
        """A pass of 2 * rows, in passes of so many rows."""
        weight = self._causal_lm.get_output_embeddings().weight
        if weight.device.type != "cpu":
            return _BY_BYTES if rows <= _FEW_ROWS["cuda"] else _NEVER
        if weight.dtype in (torch.float32, torch.float64):
            return _BY_BYTES if self._ratio(weight.dtype, rows) < _CHEAP else _NEVER
        if weight.dtype != torch.bfloat16 or rows > _FEW_ROWS["cpu"]:
            return _NEVER
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return _BY_BYTES
        return _WITHOUT_BFLOAT16 if rows == 1 and torch.cpu._is_avx512_supported() else _NEVER

    def _ratio(self, dtype: torch.dtype, rows: int) -> float:
        key = (rows, dtype, torch.get_num_threads())
        if key not in self._measured:
            self._measured[key] = _measure([weight for weight in self._sample() if weight.dtype == dtype], rows)
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
        readout = self._causal_lm.get_output_embeddings().weight.numel()
        embeddings = self._causal_lm.get_input_embeddings().weight.numel()
        rest = sum(p.numel() for p in self._causal_lm.base_model.parameters()) - embeddings
        return readout / max(1, rest)


def _measure(weights: list[Tensor], rows: int) -> float:
    """Time of products with 2 * rows over that with so many rows, of the fastest of a few."""
    if not weights:
        return _NEVER
    fastest = {rows: float("inf"), 2 * rows: float("inf")}
    for _ in range(_REPEATS):
        for count in fastest:
            start = time.process_time()
            for weight in weights:
                nn.functional.linear(weight[:1].expand(count, -1).contiguous(), weight)
            fastest[count] = min(fastest[count], time.process_time() - start)
    return fastest[2 * rows] / fastest[rows]
