"""Whether an output is right: EvalPlus 0.3.1's comparison and its special oracles, with its mistakes corrected.

* Each input is compared with its own tolerance; EvalPlus keeps the one that it sets at the first float.
* The shapes must be the same; np.allclose broadcasts, so that [[0.3]] passes for [0.3].
* HumanEval/32 is passed by a root; EvalPlus never counts one.
* Mbpp/164, of data sets before v0.2.0, is compared like any other; EvalPlus lets anything pass.

The values have types that we know (sandbox.decoding), so that no `==` is the solution's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from evalplus.eval import is_floats
from evalplus.eval._special_oracle import (
    MBPP_OUTPUT_NOT_NONE_TASKS,
    MBPP_OUTPUT_SET_EQ_TASKS,
    _digit_distance_nums,
    _poly,
    _surface_Area,
)

FLOAT_ATOL = 1e-6  # EvalPlus's, for expected floats where the task gives no tolerance
FLOAT_RTOL = 1e-7


class Comparison:
    """How the outputs of one task are compared.

    Attributes:
        as_set: outputs are compared as sets.
        not_none: only whether there is an output at all is compared.
        finds_root: HumanEval/32, whose outputs are right if they are roots.
        special: an output may be right although it differs from the expected one by more than a tolerance, or wrong although
            it is the same.
    """

    def __init__(self, dataset: str, entry_point: str, atol: float) -> None:
        mbpp = dataset == "mbpp"
        self.atol = atol
        self.as_set = mbpp and entry_point in MBPP_OUTPUT_SET_EQ_TASKS
        self.not_none = mbpp and entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
        self._oracle = {
            (True, "sum_div"): _is_zero,
            (True, "surface_Area"): self._is_surface,
            (True, "digit_distance_nums"): _is_distance,
        }.get((mbpp, entry_point))
        self.finds_root = not mbpp and entry_point == "find_zero"
        self.special = self._oracle is not None or self.finds_root

    def expected(self, value: Any) -> Any:
        """What the canonical solution's output stands for: a set, or whether there is one."""
        return set(value) if self.as_set else value is not None if self.not_none else value

    def right(self, arguments: list, expected: Any, out: Any) -> bool:
        """arguments: as they were before the call, whatever a solution has made of them."""
        try:
            return self._right(arguments, expected, out)
        except (TypeError, ValueError, ArithmeticError, RecursionError):  # values that cannot be compared
            return False

    def _right(self, arguments: list, expected: Any, out: Any) -> bool:
        if self.finds_root:
            return bool(abs(_poly(*arguments, out)) <= self.atol)
        if self.not_none and not isinstance(out, bool):
            out = out is not None
        if self._oracle is not None and self._oracle(arguments, out):
            return True
        return bool(out == expected) or self._close(expected, out)

    def _close(self, expected: Any, out: Any) -> bool:
        atol = self.atol or (FLOAT_ATOL if is_floats(expected) else 0)
        if atol == 0 or self.as_set or type(out) is not type(expected):
            return False
        got, wanted = np.asarray(out), np.asarray(expected)
        return got.shape == wanted.shape and bool(np.allclose(got, wanted, rtol=FLOAT_RTOL, atol=atol))

    def _is_surface(self, arguments: list, out: Any) -> bool:
        return bool(abs(out - _surface_Area(*arguments)) <= self.atol)


def _is_zero(arguments: list, out: Any) -> bool:
    return bool(out == 0)


def _is_distance(arguments: list, out: Any) -> bool:
    return bool(out == _digit_distance_nums(*arguments))
