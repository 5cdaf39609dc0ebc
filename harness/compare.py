"""The one comparison, the one message, the one tolerance table.

A tolerance is either arithmetic (`dot_bound`, from the dtype and the length of the sums) or the naive implementation's
own error against float64 (`twice_the_loop`); it is never what happened to pass. Every comparison is recorded, on a pass
too, with the smallest factor of its bound that would have passed, so that numerics which worsen under their limit are
seen (Polygraphy reports the same).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

import numpy as np
import torch

from harness.outcome import Void

# Unit roundoff u: half the gap between 1 and the next number, 2 ** -(bits of the significand, the hidden one included).
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# A check is void unless the experts' effect is at least this many times the largest allowed difference: then a fault of
# one per cent of the effect is still outside the tolerance.
SIGNAL_TO_TOLERANCE = 100.0


@dataclass(frozen=True)
class Comparison:
    """The worst element. `factor` is the smallest multiple of the bound that would pass; at most 1 passes."""

    what: str
    index: tuple[int, ...]
    got: float
    wanted: float
    bound: float
    factor: float
    effect: float | None = None

    def __str__(self) -> str:
        where = f" at {list(self.index)}" if self.index else ""
        return (
            f"{self.what or 'value'}{where}: got {self.got:.9g}, wanted {self.wanted:.9g}, allowed +-{self.bound:.3g}, "
            f"difference {abs(self.got - self.wanted):.3g}; it would pass at {self.factor:.3g} times the bound"
        )


class Mismatch(AssertionError):
    """A failed comparison: `comparison` is its worst element, None where there is no number (shape, tokens, text)."""

    def __init__(self, message: str, comparison: Comparison | None = None) -> None:
        self.comparison = comparison
        super().__init__(message)


_ledger: ContextVar[list[Comparison] | None] = ContextVar("comparisons of the running check", default=None)


@contextmanager
def recording() -> Iterator[list[Comparison]]:
    """Collect every comparison made inside the block; the plugin wraps each check in one."""
    comparisons: list[Comparison] = []
    token = _ledger.set(comparisons)
    try:
        yield comparisons
    finally:
        _ledger.reset(token)


def assert_within(got: object, want: object, bound: object, *, effect: object | None = None, what: str = "") -> Comparison:
    """Require |got - want| <= bound at every element.

    got, want: tensors, arrays or numbers of one shape; compared in float64.
    bound: a number or an array that broadcasts to that shape.
    effect: the experts' effect on this quantity, a number or an array whose largest magnitude counts.
    Raises Mismatch naming the worst element, a NaN or infinity anywhere in got or want, or the two shapes; Void when the
    comparison passes but effect < 100 * max(bound), because then a wrong expert would have passed too.
    """
    __tracebackhide__ = True
    got_array, want_array = as_float64(got), as_float64(want)
    if got_array.shape != want_array.shape:
        raise Mismatch(f"{what or 'value'}: got shape {got_array.shape}, wanted shape {want_array.shape}")
    if got_array.size == 0:
        raise Void(f"{what or 'value'}: nothing was compared, the shape is {got_array.shape}")
    bounds = np.broadcast_to(as_float64(bound), got_array.shape)
    size = None if effect is None else float(np.max(np.abs(as_float64(effect))))
    comparison = _worst(got_array, want_array, bounds, what=what, effect=size)
    record(comparison)
    if not comparison.factor <= 1.0:
        raise Mismatch(str(comparison), comparison)
    if size is not None and not size >= SIGNAL_TO_TOLERANCE * float(bounds.max()):
        raise Void(
            f"{what or 'value'}: the experts' effect {size:.3g} is less than {SIGNAL_TO_TOLERANCE:g} times "
            f"the tolerance {float(bounds.max()):.3g}, so a wrong expert would pass"
        )
    return comparison


def assert_bitwise(got: torch.Tensor, want: torch.Tensor, *, what: str = "") -> Comparison:
    """Require one dtype, one shape and equal values; a NaN anywhere fails.

    0.0 and -0.0 count as equal: adding a zero delta turns the second into the first.
    """
    __tracebackhide__ = True
    if got.dtype != want.dtype:
        raise Mismatch(f"{what or 'value'}: got {got.dtype}, wanted {want.dtype}")
    return assert_within(got, want, 0.0, what=what)


def assert_equal(got: object, want: object, *, what: str) -> None:
    """Require two plain values (numbers, text, lists, ids) to be equal."""
    __tracebackhide__ = True
    if got != want:
        raise Mismatch(f"{what}: got {_short(got)}, wanted {_short(want)}")


def assert_same_tokens(
    got: object,
    want: object,
    *,
    got_logits: object | None = None,
    want_logits: object | None = None,
    margin: float = 0.0,
    what: str = "tokens",
) -> int | None:
    """Require one row of token ids to equal another up to a genuine near tie; returns where they part, or None.

    got, want: (T,) token ids; got_logits, want_logits: (T, vocabulary), the logits that each id was chosen from.
    At the first differing step both runs must hold the two candidates within `margin` of each other; what follows is
    then not comparable and is not compared. Without logits any difference fails.
    """
    __tracebackhide__ = True
    got_ids, want_ids = _ids(got), _ids(want)
    step = next((t for t, pair in enumerate(zip(got_ids, want_ids, strict=False)) if pair[0] != pair[1]), None)
    if step is None:
        if len(got_ids) != len(want_ids):
            raise Mismatch(f"{what}: got {len(got_ids)} tokens, wanted {len(want_ids)}, equal up to the shorter one's end")
        return None
    message = f"{what}: first difference at step {step}, got token {got_ids[step]}, wanted {want_ids[step]}"
    if got_logits is None or want_logits is None:
        raise Mismatch(message)
    gaps = [abs(rows[step, got_ids[step]] - rows[step, want_ids[step]]) for rows in map(as_float64, (got_logits, want_logits))]
    gap = float(np.max(gaps))
    record(Comparison(f"{what}, logit gap at step {step}", (step,), gap, 0.0, margin, _factor(gap, margin)))
    if not gap <= margin:
        raise Mismatch(f"{message}; the two logits are {gap:.3g} apart, a near tie is at most {margin:.3g}")
    return step


def dot_bound(terms: int, dtype: torch.dtype, abs_sum: object) -> np.ndarray:
    """How far a sum of `terms` products in `dtype` may be from the exact one: n u / (1 - n u) * sum|a_i b_i|.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; it holds for every order of summation.
    abs_sum: sum|a_i b_i|, from the oracle run on absolute values. The result also covers products lost to underflow.
    Raises ValueError when terms * u >= 1, where no such bound exists.
    """
    roundoff = terms * UNIT_ROUNDOFF[dtype]
    if roundoff >= 1.0:
        raise ValueError(f"a sum of {terms} products in {dtype} has no error bound; accumulate in a wider type")
    smallest = torch.finfo(dtype).smallest_normal
    return roundoff / (1.0 - roundoff) * np.abs(as_float64(abs_sum)) + terms * smallest


def twice_the_loop(loop: object, oracle: object, dtype: torch.dtype) -> float:
    """Twice the largest error of the naive loop against float64, plus a floor of two roundings of the largest value.

    The rule is flash-attention's (its tests compare with the plain PyTorch implementation in the same dtype); the floor
    keeps a loop that happens to be exact from allowing nothing at all. loop, oracle: same shape. dtype: what the loop
    computed in. Raises ValueError when the loop itself is not finite: such a bound would allow everything.
    """
    exact = as_float64(oracle)
    error = float(np.max(np.abs(as_float64(loop) - exact), initial=0.0))
    if not math.isfinite(error):
        raise ValueError("the naive loop or the oracle is not finite, so it cannot bound anything")
    return 2.0 * error + rounding_floor(exact, dtype)


def rounding_floor(values: object, dtype: torch.dtype) -> float:
    """Two roundings of the largest magnitude in `values` to `dtype`: 2 u max|v|."""
    return 2.0 * UNIT_ROUNDOFF[dtype] * float(np.max(np.abs(as_float64(values)), initial=0.0))


def summary(comparisons: Sequence[Comparison]) -> dict[str, object]:
    """Evidence of one check: how many comparisons, the worst one, and the tolerance that would have been required."""
    if not comparisons:
        return {}
    worst = max(comparisons, key=lambda c: math.inf if math.isnan(c.factor) else c.factor)
    return {"comparisons": len(comparisons), "required_tolerance": worst.factor, "worst": asdict(worst)}


def record(comparison: Comparison) -> None:
    ledger = _ledger.get()
    if ledger is not None:
        ledger.append(comparison)


def is_of_torchao(value: object) -> bool:
    """Whether it is one of torchao's tensors, which looks like a plain one, but is packed: the only kind with such a list."""
    return hasattr(value, "tensor_data_names")


def as_float64(value: object) -> np.ndarray:
    """A tensor on any device, an array or a number, as a float64 array."""
    if is_of_torchao(value):
        value = value.dequantize()
    if isinstance(value, torch.Tensor):
        return value.detach().to(device="cpu", dtype=torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)


def _worst(got: np.ndarray, want: np.ndarray, bounds: np.ndarray, *, what: str, effect: float | None) -> Comparison:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        errors = np.abs(got - want)
        factors = np.where(errors == 0.0, 0.0, errors / bounds)
    # A NaN or infinity is the worst element there is, even where both sides agree on it.
    factors = np.where(np.isfinite(got) & np.isfinite(want) & ~np.isnan(factors), factors, np.inf)
    index = np.unravel_index(int(np.argmax(factors)), factors.shape)
    return Comparison(
        what=what,
        index=tuple(int(i) for i in index),
        got=float(got[index]),
        wanted=float(want[index]),
        bound=float(bounds[index]),
        factor=float(factors[index]),
        effect=effect,
    )


def _factor(error: float, bound: float) -> float:
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 and math.isfinite(error) else math.inf


def _ids(tokens: object) -> list[int]:
    return [int(token) for token in (tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens)]


def _short(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
