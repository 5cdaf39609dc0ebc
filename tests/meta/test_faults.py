"""The judge is measured: every planted fault is caught by the check that claims it, and correct subjects raise no alarm."""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.faults import FAULTS, Fault
from fixtures.laws import CHECKS, judge
from harness import outcome
from harness.bench import Bench
from harness.specimens import write_base, write_checkpoint
from harness.subjects import find_subject

UNCLAIMED = {"equivalence.drift": "reports numbers of the reference and demands nothing"}
# compile_equal takes seconds, most of them torch's own tracing; one family is enough to look for false alarms.
SLOW = {"training.compile_equal"}


@pytest.fixture(scope="session")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """specimen(family=..., seed=..., **options of write_checkpoint) -> directory; written once per session."""
    written: dict[tuple, Path] = {}

    def write(family: str = "llama", seed: int = 0, **options: object) -> Path:
        base_key, key = ("base", family, seed), ("checkpoint", family, seed, *sorted(options.items()))
        if base_key not in written:
            written[base_key] = write_base(tmp_path_factory.mktemp("base"), family, seed=seed)
        if key not in written:
            directory = tmp_path_factory.mktemp("checkpoint")
            written[key] = write_checkpoint(directory, written[base_key], seed=seed, **options)
        return written[key]

    return write


def ids(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


@pytest.mark.parametrize("fault", FAULTS, ids=ids)
def test_planted_fault_fails_the_check_that_claims_it(fault: Fault, specimen: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(specimen(**fault.specimen), checkpoint)
    found, message = judge(Bench(checkpoint, fault.subject()), fault.caught_by)
    assert found == outcome.FAIL, f"{fault.caught_by} ended as {found}: {message}"


def test_every_check_is_claimed_by_a_fault() -> None:
    claimed = {fault.caught_by for fault in FAULTS}
    checks = {check for check in CHECKS if not check.startswith("speed.")}  # of those, test_waste.py plants the faults
    assert claimed | set(UNCLAIMED) == checks
    assert not claimed & set(UNCLAIMED)


def test_fault_names_are_unique() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))


def test_every_check_states_law_reason_and_tolerance() -> None:
    for check, function in CHECKS.items():
        text = inspect.getdoc(function) or ""
        assert text.splitlines()[0].endswith("."), check
        assert "Reason:" in text and "Tolerance:" in text, check


CORRECT = [
    ("llama", "base", {"seed": 1, "use_rslora": True}),
    ("gpt2", "layer", {"seed": 2, "top_k": 2, "num_experts": 3}),
    ("gemma", "all_experts", {"seed": 3, "targets": "all-linear", "num_experts": 2}),
    ("qwen", "embedding", {"seed": 4, "num_experts": 5, "top_k": 3}),
    ("llama", "base", {"seed": 5, "num_experts": 1}),
    ("gpt2", "base", {"seed": 6, "num_experts": 2, "router": False}),
]


@pytest.mark.parametrize("subject", ["dylo-moe", "naive-loop"])
@pytest.mark.parametrize(("family", "features", "options"), CORRECT, ids=lambda value: str(value).replace(" ", ""))
def test_correct_subject_raises_no_alarm(
    subject: str, family: str, features: str, options: dict, specimen: Callable[..., Path]
) -> None:
    bench = Bench(specimen(family, features=features, **options), find_subject(subject))
    ended = {check: judge(bench, check) for check in CHECKS if check not in SLOW}
    alarms = {c: result for c, result in ended.items() if result[0] in (outcome.FAIL, outcome.ERROR)}
    assert not alarms
    voids = {c: result for c, result in ended.items() if result[0] == outcome.VOID}
    assert len(voids) <= 2, voids
    applied = sum(result[0] == outcome.PASS for result in ended.values())
    assert applied >= len(CHECKS) // 2


def test_router_over_one_expert_is_judged_by_its_experts(specimen: Callable[..., Path]) -> None:
    """The gate's gradient is zero there, which says nothing against the checkpoint."""
    bench = Bench(specimen("llama", num_experts=1), find_subject("dylo-moe"))
    assert judge(bench, "training.gradients_reach_router_and_experts") == (outcome.PASS, "NoneType: None")


def test_correct_subject_compiled_raises_no_alarm(specimen: Callable[..., Path]) -> None:
    for check in SLOW:
        assert judge(Bench(specimen("llama"), find_subject("dylo-moe")), check)[0] == outcome.PASS


@pytest.mark.parametrize("seed", range(3))
def test_layer_laws_raise_no_alarm_on_other_seeds(seed: int, specimen: Callable[..., Path]) -> None:
    for subject, check in itertools.product(("dylo-moe", "naive-loop"), (c for c in CHECKS if c.startswith("layer."))):
        bench = Bench(specimen("llama", features="base"), find_subject(subject), seed=seed + 10)
        found, message = judge(bench, check)
        assert found == outcome.PASS, f"{subject}, {check}, seed {seed}: {message}"
