"""The decoder's checks are measured: each catches its planted fault, and none of them alarms for a correct decoder."""

from __future__ import annotations

import inspect

import pytest
from evalplus.provider.utility import EOS

import harness.checks.decoder as checks_file
from fixtures.decoder_faults import DECODER_FAULTS, FaultyDecoding
from fixtures.layouts import BY_NAME, write_layout
from harness import compare, outcome
from harness.bench import Bench
from harness.specimens import write_base, write_checkpoint
from harness.subjects import find_subject

CHECKS = {f"decoder.{n.removeprefix('check_')}": f for n, f in vars(checks_file).items() if n.startswith("check_")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("base"), "llama", chat_template=True)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), base, num_experts=3)


@pytest.fixture(autouse=True)
def _stop_list_restored():
    before = list(EOS)
    yield
    EOS[:] = before


def judge(bench, check):
    error = None
    with compare.recording():
        try:
            CHECKS[check](bench)
        except Exception as raised:  # noqa: BLE001  (whatever a faulty subject raises is its outcome)
            error = raised
    return outcome.outcome_of(error), f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("fault", DECODER_FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_fails_the_check_that_claims_it(fault, checkpoint):
    found, message = judge(Bench(checkpoint, fault.subject()), fault.caught_by)
    assert found == outcome.FAIL, f"{fault.caught_by} ended as {found}: {message}"


def test_every_check_is_claimed_by_a_fault_and_states_law_reason_and_tolerance():
    assert {fault.caught_by for fault in DECODER_FAULTS} == set(CHECKS)
    for check, function in CHECKS.items():
        text = inspect.getdoc(function)
        assert text.splitlines()[0].endswith("."), check
        assert "Reason:" in text and "Tolerance:" in text, check


def test_correct_decoder_passes_every_check(checkpoint):
    bench = Bench(checkpoint, find_subject("dylo-moe"))
    assert {check: judge(bench, check) for check in CHECKS} == dict.fromkeys(CHECKS, (outcome.PASS, "NoneType: None"))


def test_subject_without_a_decoder_is_not_judged(checkpoint):
    bench = Bench(checkpoint, find_subject("naive-loop"))
    assert {judge(bench, check)[0] for check in CHECKS} == {outcome.NOT_APPLICABLE}


def test_checkpoint_that_a_decoder_cannot_be_told_about_is_not_judged(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    path = write_layout(tmp_path / "full", base, "D1")
    bench = Bench(path, find_subject("dylo-moe"), base_model=str(base), assume=BY_NAME["D1"].options)
    assert judge(bench, "decoder.sample_files_never_mix")[0] == outcome.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"num_experts": 4, "top_k": 2, "features": "embedding"}),
        ("gemma", {"num_experts": 2, "dtype": "bfloat16", "targets": "all-linear"}),
        ("qwen", {"num_experts": 11, "features": "layer"}),
        ("llama", {"num_experts": 1, "router": False}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_correct_decoder_of_other_checkpoints_raises_no_alarm(family, options, tmp_path):
    base = write_base(tmp_path / "base", family, seed=1)
    bench = Bench(write_checkpoint(tmp_path / "checkpoint", base, seed=1, **options), find_subject("dylo-moe"))
    ended = {check: judge(bench, check) for check in CHECKS}
    assert not {check: found for check, found in ended.items() if found[0] in (outcome.FAIL, outcome.ERROR)}
    assert sum(found[0] == outcome.PASS for found in ended.values()) >= 8, ended


def test_text_with_tabs_raises_no_alarm(checkpoint):
    def writes_tabs(decoder, options):
        text_of = decoder._decode
        decoder._decode = lambda ids: text_of(ids)[:6] + "\t".join(text_of(ids)[6:])

    found = judge(Bench(checkpoint, FaultyDecoding(writes_tabs)), "decoder.cut_at_earliest_stop")
    assert found == (outcome.PASS, "NoneType: None")
