"""The judge is measured on every kind of router: planted faults are caught, and correct subjects raise no alarm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.adamole import write_adamole
from fixtures.faults import Fault
from fixtures.gated import draw
from fixtures.laws import CHECKS, judge
from fixtures.mola import write_mola
from fixtures.router_faults import FAULTS, HANDED_ON, OVER_BATCH
from fixtures.router_specimens import ALL_KINDS, write
from harness import outcome
from harness.bench import Bench
from harness.calibration import calibrate
from harness.oracles.gates import RULES
from harness.readings import read_artifact
from harness.specimens import write_base
from harness.subjects import find_subject

# What depends on the router; the rest is judged on every kind by the command itself.
LAWS = (
    "model.routing_is_applied",
    "model.router_equals_oracle",
    "model.routed_logits_equal_reference",
    "model.cached_decode_equals_recompute",
    "model.permutation",
    "model.save_load_bitwise",
    "training.train_eval_modes",
    "training.gradients_reach_router_and_experts",
)


@pytest.fixture(scope="session")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """routed(kind=..., **options) -> directory; written once per session."""
    base = write_base(tmp_path_factory.mktemp("base"), "llama")
    written: dict[str, Path] = {}

    def made(**options: object) -> Path:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = write(tmp_path_factory.mktemp("routed") / "checkpoint", base, **options)
        return written[key]

    return made


def test_laws_of_a_token_alone_do_not_apply_to_a_softmax_over_the_batch(routed: Callable[..., Path]) -> None:
    bench = Bench(routed(**OVER_BATCH), find_subject("dylo-moe"))
    laws = {
        law: outcome.PASS for law in ("model.router_equals_oracle", "model.routed_logits_equal_reference", "model.dtype_move")
    }
    laws |= {f"model.{name}": outcome.NOT_APPLICABLE for name in ("causal", "rows_independent", "cached_decode_equals_recompute")}
    assert {law: judge(bench, law)[0] for law in laws} == laws


def test_laws_of_what_experts_do_do_not_apply_where_every_input_is_handed_on(routed: Callable[..., Path]) -> None:
    bench = Bench(routed(**HANDED_ON), find_subject("dylo-moe"))
    laws = dict.fromkeys(("model.routed_logits_equal_reference", "model.cached_decode_equals_recompute"), outcome.PASS)
    laws |= dict.fromkeys((LAWS[-1], "training.gradient_checkpointing_equal", "equivalence.drift"), outcome.NOT_APPLICABLE)
    assert {law: judge(bench, law)[0] for law in laws} == laws


def ids(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


@pytest.mark.parametrize("fault", FAULTS, ids=ids)
def test_planted_fault_fails_the_check_that_claims_it(fault: Fault, routed: Callable[..., Path]) -> None:
    found, message = judge(Bench(routed(**fault.specimen), fault.subject()), fault.caught_by)
    assert found == outcome.FAIL, f"{fault.caught_by} ended as {found}: {message}"


def test_every_rule_and_every_kind_has_a_fault() -> None:
    kinds = {fault.specimen["kind"] for fault in FAULTS}
    assert set(ALL_KINDS) - kinds == set()
    assert set(RULES) <= kinds


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_correct_subject_raises_no_alarm(kind: str, routed: Callable[..., Path]) -> None:
    bench = Bench(routed(kind=kind), find_subject("dylo-moe"), seed=ALL_KINDS.index(kind))
    for check in LAWS:
        found, message = judge(bench, check)
        assert found in (outcome.PASS, outcome.NOT_APPLICABLE), f"{kind}, {check}: {message}"


@pytest.mark.parametrize("seed", range(2))
def test_small_sum_to_divide_by_raises_no_alarm(seed: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    directory = write_adamole(tmp_path / "adamole", draw(base, ("q_proj", "v_proj")), pickled=False, max_threshold=0.5)
    bench = Bench(directory, find_subject("dylo-moe"), seed=seed)
    for check in ("model.routed_logits_equal_reference", "model.rows_independent", "model.cached_decode_equals_recompute"):
        found, message = judge(bench, check)
        assert found == outcome.PASS, f"{check}: {message}"


@pytest.mark.parametrize("kind", ["feed_forward", "peft-xlora"])
def test_naive_loop_raises_no_alarm(kind: str, routed: Callable[..., Path]) -> None:
    bench = Bench(routed(kind=kind), find_subject("naive-loop"), seed=7)
    for check in LAWS:
        found, message = judge(bench, check)
        assert found in (outcome.PASS, outcome.NOT_APPLICABLE), f"{kind}, {check}: {message}"


def test_laws_named_here_exist() -> None:
    assert set(LAWS) <= set(CHECKS)


def test_multi_pass_differs_from_a_mixture_in_the_layers(tmp_path: Path) -> None:
    from harness.specimens import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "moe", write_base(tmp_path / "base", "llama"), num_experts=3, top_k=2)
    bench = Bench(checkpoint, find_subject("multi-pass"))
    outcomes = {check: judge(bench, check)[0] for check in ("model.routing_is_applied", "model.routed_logits_equal_reference")}
    assert outcomes == dict.fromkeys(outcomes, outcome.FAIL)
    assert judge(bench, "equivalence.constant_one_hot_equals_multi_pass")[0] == outcome.PASS
    assert judge(bench, "model.causal")[0] == outcome.FAIL
    shutil.rmtree(tmp_path / "moe")


def test_what_the_user_states_reaches_the_calibration_and_no_foreign_file_is_taken_for_stock_pefts(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    path = write_mola(tmp_path / "mola", draw(base, ("q_proj",), experts=(2, 3), ranks=(4, 4)), pickled=False)
    results = calibrate(path, None, ["model.causal"], {"top_k": (1, 2)})
    assert {result["outcome"] for result in results} == {outcome.PASS}
    assert set(read_artifact(path, None, {"top_k": (1, 2)}).adapter_directories) == {None}
