"""Laws of memory: the peak of live tensor bytes, counted, not the process's size."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from harness.bench import Bench
from harness.compare import Mismatch, assert_within
from harness.measure import peak_bytes, retained_bytes
from harness.outcome import NotApplicable

TOKENS = 256
SMALLEST_HIDDEN = 128


def check_forward_peak(bench: Bench) -> None:
    """A routed pass, of one row and of four, needs hardly more memory than a pass with one expert alone.

    Reason: users were promised at most 10 % more; an implementation that holds every expert's output at once breaks that
    silently.
    Tolerance: peak_memory_ratio, on counted bytes; not below hidden size 128, where the ranks are not small beside it.
    """
    hidden = bench.model.config.hidden_size
    if hidden < SMALLEST_HIDDEN:
        raise NotApplicable(
            f"hidden size {hidden}: ranks are not small beside it, so the promise of low-rank memory does not apply"
        )
    limit = bench.gate.threshold("peak_memory_ratio")
    for rows in (1, 4):
        routed = peak_bytes(_routed_pass(bench, rows), bench.device)
        single = peak_bytes(_single_pass(bench, rows), bench.device)
        ratio = routed / single
        if rows == 1:
            bench.evidence(
                ratios={"routed/one expert peak bytes": {"ratio": ratio, "limit": limit, "kind": "count"}}, bytes=routed
            )
        if not ratio <= limit:
            told = f"{routed} bytes, {ratio:.3f} times one expert's {single}, allowed {limit:g} times"
            raise Mismatch(f"peak of a routed pass of {rows} row{'s' * (rows > 1)}: {told}")


def check_no_leak(bench: Bench) -> None:
    """Repeated passes, and repeated generations, keep no more memory than the first.

    Reason: state kept between calls (recorded weights, hooks, caches) ends in an out-of-memory error hours into an evaluation.
    Tolerance: leaked_bytes per call, on counted bytes of live tensors.
    """
    passing, generating = _routed_pass(bench), _generation(bench)

    def work() -> None:
        passing()
        if callable(getattr(bench.model, "generate", None)):
            generating()

    retained = retained_bytes(work, bench.device)
    growth = max(later - earlier for earlier, later in zip(retained, retained[1:], strict=False))
    bench.evidence(retained_bytes=retained)
    assert_within(max(growth, 0), 0, bench.gate.threshold("leaked_bytes"), what="bytes kept by each further pass and generation")


def _routed_pass(bench: Bench, rows: int = 1) -> Callable[[], None]:
    """The router decides; where the checkpoint has none, the weights are uniform (rows, 1, E)."""
    ids, options = _ids(bench, rows), _cacheless(bench)
    if bench.router is None:
        weights = torch.full((rows, 1, bench.num_experts), 1 / bench.num_experts, device=bench.device)
        options = {**options, "routing_weights": weights}

    @torch.inference_mode()
    def work() -> None:
        bench.model(ids, **options)

    return work


def _single_pass(bench: Bench, rows: int) -> Callable[[], None]:
    ids, cacheless = _ids(bench, rows), _cacheless(bench)

    @torch.inference_mode()
    def work() -> None:
        bench.model(ids, expert_id=0, **cacheless)

    return work


def _generation(bench: Bench) -> Callable[[], None]:
    """One token after a few, by the router where there is one."""
    ids = _ids(bench, 1)[:, :4]
    strategy = "single:0" if bench.router is None else "router"

    def work() -> None:
        bench.model.generate(ids, torch.ones_like(ids), strategy=strategy, do_sample=False, max_new_tokens=1, pad_token_id=0)

    return work


def _cacheless(bench: Bench) -> dict[str, bool]:
    """A KV cache is state that the caller asked for, not the pass's own need; a subject without caches has no such option."""
    return {"use_cache": False} if "use_cache" in inspect.signature(type(bench.model).forward).parameters else {}


def _ids(bench: Bench, rows: int = 1) -> torch.Tensor:
    """One row of TOKENS, or several that are together a quarter as many."""
    drawn = bench.rng(8).integers(2, bench.vocab_size, size=(rows, TOKENS if rows == 1 else TOKENS // (4 * rows)))
    return torch.as_tensor(drawn, device=bench.device)
