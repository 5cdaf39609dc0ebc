"""Runs every cell between two tests of the clock, and keeps what was found."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from harness.measure import PairedRatio, PairedTimer, Work
from harness.performance import forward, generation, gpu, loading, record, training
from harness.performance.cells import Cell, Result

CPU_GROUPS: dict[str, Callable[[bool], Iterator[Cell]]] = {
    "dense": forward.dense,
    "top-k": forward.top_k,
    "multi-pass": forward.multi_pass,
    "peers": forward.peers,
    "one-pass": generation.one_pass,
    "two-pass": generation.two_passes,
    "xlora": generation.xlora,
    "at-once": generation.at_once,
    "step": training.steps,
    "memory": training.memory,
    "loading": loading.loading,
    "growth": forward.growth,
}
GPU_GROUPS: dict[str, Callable[[bool], Iterator[Cell]]] = {"prefill": gpu.prefill, "decode": gpu.decode, "xlora": gpu.xlora}
GROUPS = {"cpu": CPU_GROUPS, "cuda": GPU_GROUPS}
# An A/A test: the same work twice. Its median has to be this near to 1, and 1 inside its interval or nearly so.
CLOCK_PAIRS = 15
CLOCK_BAND = 0.02
# A neighbour's burst may be over after a pause, in seconds.
CLOCK_ATTEMPTS = 4
CLOCK_PAUSE = 3
SIZES = {"cpu": 768, "cuda": 8192}  # of the matrices, for some milliseconds


class Refused(Exception):
    """Nothing is measured or published; the message says why in one line."""


def run(options: Namespace) -> int:
    """Measures the chosen groups; 0 when every goal was reached, 2 when some were not."""
    groups = GROUPS[options.device]
    names = options.only or list(groups)
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise Refused(f"unknown group {unknown[0]!r}, but should be among {', '.join(groups)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device: cuda: no CUDA device is visible to torch {torch.__version__}")
    work = partial(products, device=options.device)
    clock = check_clock(options.threads, work, work, device=options.device)
    missed = 0
    for name in names:
        for cell in groups[name](options.quick):
            result = _measure(cell, options)
            again = check_clock(options.threads, work, work, device=options.device)  # else it is not kept
            settings = {"threads": options.threads, "quick": options.quick, "device": options.device}
            record.keep(options.output, [result], clocks=(clock, again), **settings)
            missed += not result.reached
            clock = again
    print(f"{missed} goals missed; {record.path_in(options.output)}")
    return 2 if missed else 0


def products(count: int = 4, device: str = "cpu") -> None:
    matrix = torch.ones(SIZES[device], SIZES[device], device=device)
    for _ in range(count):
        matrix @ matrix


def check_clock(
    threads: int, ours: Work = products, other: Work = products, *, device: str = "cpu", pause: float = CLOCK_PAUSE
) -> PairedRatio:
    """The same work twice, paired as in every cell. Raises Refused where they seem to differ."""
    for attempt in range(CLOCK_ATTEMPTS):
        time.sleep(attempt * pause)
        timer = PairedTimer(ours, other, device=device, seed=time.time_ns() % 2**32, threads=threads)
        found = timer.more(CLOCK_PAIRS)
        is_near = abs(found.ratio - 1) <= CLOCK_BAND and found.low <= 1 + CLOCK_BAND and found.high >= 1 - CLOCK_BAND
        if is_near and found.high - found.low <= 5 * CLOCK_BAND:
            break
    else:
        bounds = f"{found.ratio:.3f} times itself (95 % bounds {found.low:.3f} to {found.high:.3f})"
        raise Refused(f"a product took {bounds}: no ratio of this machine means anything now; load {os.getloadavg()[0]:.1f}")
    return found


def _measure(cell: Cell, options: Namespace) -> Result:
    start = time.perf_counter()
    result = cell.measured(pairs=options.pairs, threads=options.threads, device=options.device)
    verdict = "reached" if result.reached else "MISSED"
    limit = "" if cell.limit is None else f", limit {cell.limit:.3f}"
    spread = f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"
    goal = f"goal {'>=' if cell.at_least else '<='} {cell.goal:.3f}{limit}"
    note = f"; {cell.note}" if cell.note else ""
    took = f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
    print(f"{verdict:8}{cell.group}: {cell.name}: {spread}; {goal}{note}; {took}", flush=True)
    return result


def publish(source: Path, target: Path) -> int:
    """Writes the page from what is in `source`. Raises Refused where nothing is."""
    from harness.performance.page import PICTURES, write_page

    if not record.path_in(source).is_file():
        raise Refused(f"{record.path_in(source)} is not there: measure first")
    write_page(record.read(source), target)
    record.path_in(target / PICTURES).write_text(record.path_in(source).read_text(encoding="utf-8"), encoding="utf-8")
    return 0
