"""The laws of speed and memory: every planted waste fails the check that claims it, and our own implementation fails none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.layouts import write_layout
from fixtures.wasteful import WASTES, Waste, WastefulSubject
from harness.bench import Bench
from harness.builtin import write_timing_base
from harness.catalogue import read_laws
from harness.checks import memory, speed
from harness.compare import Mismatch
from harness.gate import Threshold, load_gate
from harness.outcome import NotApplicable
from harness.specimens import write_base, write_checkpoint

CHECKS = {f"{module.__name__.rpartition('.')[2]}.{name[6:]}": check
          for module in (speed, memory) for name, check in vars(module).items() if name.startswith("check_")}  # fmt: skip


@pytest.fixture(scope="module")
def specimen(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("timing")
    base = write_timing_base(directory / "base", hidden_size=256, layers=2)
    return write_checkpoint(directory / "moe", base, num_experts=8, features="base")


def bench_of(specimen: Path, waste: Waste | None) -> Bench:
    """A gate that times passes of 0.1 GFLOP, so that a test takes a second."""
    gate = load_gate()
    small = Threshold(0.1, "a small specimen, for a test in which the fault is a factor of four")
    return Bench(
        specimen, WastefulSubject(waste), gate=replace(gate, thresholds={**gate.thresholds, "smallest_timed_gflop": small})
    )


@pytest.mark.parametrize("waste", WASTES, ids=lambda waste: waste.name)
def test_waste_is_caught_by_the_check_that_claims_it(specimen, waste):
    with pytest.raises(Mismatch):
        CHECKS[waste.caught_by](bench_of(specimen, waste))


def test_every_law_of_speed_and_memory_has_a_waste_that_fails_it():
    laws = {law.id for law in read_laws() if law.id.startswith(("speed.", "memory."))}
    assert laws == set(CHECKS) == {waste.caught_by for waste in WASTES}


@pytest.mark.parametrize(
    "check", ["speed.single_pass_work", "speed.cached_generation_work", "memory.forward_peak", "memory.no_leak"]
)
def test_counted_laws_hold_for_our_own_implementation(specimen, check):
    bench = bench_of(specimen, None)
    CHECKS[check](bench)
    assert bench.take_evidence()


def test_time_of_a_tiny_model_is_not_judged(tmp_path):
    tiny = write_checkpoint(tmp_path / "moe", write_base(tmp_path / "base", "llama"), num_experts=2)
    with pytest.raises(NotApplicable, match="GFLOP"):
        speed.check_single_pass_time(Bench(tiny, WastefulSubject(None)))


def test_time_is_evidence_when_it_fails_too(specimen):
    waste = next(waste for waste in WASTES if waste.caught_by == "speed.single_pass_time")
    bench = bench_of(specimen, waste)
    with pytest.raises(Mismatch):
        speed.check_single_pass_time(bench)
    assert bench.take_evidence()["ratios"]["routed/base time"]["ratio"] > 4


def test_laws_of_mixing_do_not_apply_to_a_merged_checkpoint(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    bench = Bench(write_layout(tmp_path / "merged", base, "merged", num_experts=2), WastefulSubject(None))
    for name, check in CHECKS.items():
        with pytest.raises(NotApplicable):
            check(bench)
        assert not bench.take_evidence(), name
