"""Time, work and memory, each measured so that another tenant of the machine cannot decide the verdict.

Time is compared only as pairs within one run: A and B one after the other, in random order, on one intra-op thread, by
process CPU time (by CUDA events on a GPU). The ratio of the minima screens, because contention only ever adds time; a
bootstrap bound of the median ratio decides; pairs are added until one of them does, else the answer is Inconclusive.
Measured on two shared cores: this flagged no code against itself in 40 trials, where sequential means flagged up to 43
per cent. Work is counted floating-point operations of matrix products, memory is the peak of live tensor bytes: both
are deterministic.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harness.compare import Comparison, Mismatch, record
from harness.outcome import Inconclusive

CONFIDENCE = 0.95
BOOTSTRAP_DRAWS = 2000
FIRST_PAIRS = 7
MOST_PAIRS = 56
# Of a two-sided 95 % interval, and of a one-sided 5 % test that is to be right in 80 % of cases.
STANDARD_ERRORS_IN_INTERVAL = 2 * 1.96
STANDARD_ERRORS_TO_DETECT = 1.645 + 0.842

Work = Callable[[], object]


@dataclass(frozen=True)
class PairedRatio:
    """Time of A over time of B, from `pairs` interleaved pairs.

    low, high: bounds of the median ratio, 95 % each side taken together. detectable: the smallest change of the ratio
    that this many pairs would find in 80 % of runs.
    """

    ratio: float
    low: float
    high: float
    of_minima: float
    detectable: float
    pairs: int
    seconds: float

    def evidence(self) -> dict[str, float | int]:
        return {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "ratio_of_minima": self.of_minima,
            "detectable": self.detectable,
            "pairs": self.pairs,
            "fastest_seconds": self.seconds,
        }


class PairedTimer:
    """Times A against B in interleaved pairs; `more(n)` adds pairs and answers for all of them so far.

    threads: intra-op; with more than one, OMP_WAIT_POLICY has to be PASSIVE, or waiting is counted as work.
    """

    def __init__(self, a: Work, b: Work, *, device: str = "cpu", seed: int = 0, threads: int = 1) -> None:
        self._work = (a, b)
        self._threads = threads
        self._clock = cuda_seconds if device == "cuda" else cpu_seconds
        self._rng = np.random.default_rng(seed)
        self._times: list[tuple[float, float]] = []

    def more(self, pairs: int) -> PairedRatio:
        with intra_op_threads(self._threads):
            if not self._times:
                for work in self._work:
                    work()
            for _ in range(pairs):
                self._times.append(self._pair())
        return ratio_of(self._times, self._rng)

    @property
    def times(self) -> list[tuple[float, float]]:
        """Seconds of A and of B, pair by pair."""
        return list(self._times)

    def _pair(self) -> tuple[float, float]:
        seconds = [0.0, 0.0]
        for which in self._rng.permutation(2):
            seconds[which] = self._clock(self._work[which])
        return seconds[0], seconds[1]


def ratio_of(times: list[tuple[float, float]], rng: np.random.Generator) -> PairedRatio:
    """The paired ratio from (seconds of A, seconds of B) per pair; percentile bootstrap of the median (Efron 1979)."""
    pairs = np.asarray(times)
    ratios = pairs[:, 0] / pairs[:, 1]
    medians = np.median(rng.choice(ratios, size=(BOOTSTRAP_DRAWS, len(ratios))), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedRatio(
        ratio=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        of_minima=float(pairs[:, 0].min() / pairs[:, 1].min()),
        detectable=float((high - low) / STANDARD_ERRORS_IN_INTERVAL * STANDARD_ERRORS_TO_DETECT),
        pairs=len(ratios),
        seconds=float(pairs[:, 0].min()),
    )


def assert_ratio_at_most(
    timer: PairedTimer, limit: float, *, what: str, tell: Callable[[PairedRatio], None] = lambda found: None
) -> PairedRatio:
    """Require time of A <= limit * time of B.

    Passes when the ratio of the minima, or the upper bound of the median ratio, is within the limit; raises Mismatch
    when the lower bound is above it; otherwise doubles the number of pairs, and raises Inconclusive after MOST_PAIRS. `tell` is
    called with every estimate.
    """
    __tracebackhide__ = True
    found = timer.more(FIRST_PAIRS)
    while True:
        tell(found)
        comparison = Comparison(what, (), found.ratio, limit, 0.0, found.low / limit)
        if found.of_minima <= limit or found.high <= limit:
            return found
        if found.low > limit:
            record(comparison)
            raise Mismatch(f"{what}: {_told(found, limit)}", comparison)
        if found.pairs >= MOST_PAIRS:
            raise Inconclusive(f"{what}: {_told(found, limit)}: cannot tell; run it on a quieter machine")
        found = timer.more(min(found.pairs, MOST_PAIRS - found.pairs))


def _told(found: PairedRatio, limit: float) -> str:
    return (
        f"{found.ratio:.3g} times, allowed {limit:.3g} (95 % bounds {found.low:.3g} to {found.high:.3g}, "
        f"ratio of minima {found.of_minima:.3g}, {found.pairs} pairs)"
    )


def one_thread() -> AbstractContextManager[None]:
    """One intra-op thread: with two on shared cores, spin barriers make ratios meaningless (0.38 to 1.4 for equal code)."""
    return intra_op_threads(1)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_seconds(work: Work) -> float:
    """CPU seconds of this process in `work`; time in which another tenant had the core does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cuda_seconds(work: Work) -> float:
    """Seconds between two CUDA events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000.0


def counted_flops(work: Work) -> int:
    """Floating-point operations of the matrix products and attention in `work`; elementwise work is not counted."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        work()
    return counter.get_total_flops()


def _addmm_flops(_into: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Of the product in place, which torch (2.13) does not count."""
    return 2 * a[0] * a[1] * b[1]


def counted_calls(work: Work) -> int:
    """Operators that `work` calls, views included: what Python and launches cost does not show in the operations."""
    with _Calls() as calls:
        work()
    return calls.number


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        self.number += 1
        return func(*args, **(kwargs or {}))


def peak_bytes(work: Work, device: str = "cpu") -> int:
    """Peak of live bytes allocated by `work` above what was live before it, in its second call: the first may fill caches."""
    work()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.peak


def retained_bytes(work: Work, device: str = "cpu", *, calls: int = 3) -> list[int]:
    """Bytes still live after each of `calls` calls, after one that is not counted because it may fill caches."""
    work()
    gc.collect()
    retained = []
    start = torch.cuda.memory_allocated() if device == "cuda" else 0
    with LiveBytes() as live:
        for _ in range(calls):
            work()
            gc.collect()
            retained.append(torch.cuda.memory_allocated() - start if device == "cuda" else live.now)
    return retained


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor storage that operators create inside the block, until each is freed.

    now: live at this moment; peak: the most so far; largest: of one storage. What a kernel allocates for itself and frees again
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), counted=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), counted=True)
        return result

    def _see(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
