"""What no file of a checkpoint records, stated by the user: on the command line, to the decoder, to a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dylo_moe import PeftMoEDecoder
from dylo_moe.cli import main
from dylo_moe.errors import InvalidField, OptionError
from dylo_moe.evalplus import run_codegen
from dylo_moe.formats.options import parse_assumptions
from harness.specimens import write_base
from harness.specimens.arrow import write_arrow_checkpoint
from harness.specimens.tasks import TASKS, write_task_set


def test_values_are_json_where_they_are_json_and_text_elsewhere():
    words = ["top_k=[2, 1]", "temperature=0.7", "rng-seed=42", "router_features=base", 'adapters={"0": "DIR"}']
    assert parse_assumptions(words) == {
        "top_k": (2, 1),
        "temperature": 0.7,
        "rng_seed": 42,
        "router_features": "base",
        "adapters": {"0": "DIR"},
    }


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["seed=1"], "rng_seed"),
        (["top_k"], "NAME=VALUE"),
        (["top_k="], "NAME=VALUE"),
        (["top_k=1", "top-k=2"], "twice"),
    ],
)
def test_impossible_statements_are_refused_with_the_known_names(words, word):
    with pytest.raises(OptionError, match=word):
        parse_assumptions(words)


@pytest.fixture(scope="module")
def seedless(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("assume")
    return write_arrow_checkpoint(root / "arrow", write_base(root / "base", "llama"), num_experts=3, rng_seed=None)


def test_a_decoder_takes_what_the_files_do_not_hold(seedless):
    with pytest.raises(InvalidField, match="rng_seed"):
        PeftMoEDecoder(str(seedless), "humaneval", dtype="float32")
    decoder = PeftMoEDecoder(str(seedless), "humaneval", dtype="float32", assume={"rng_seed": 42})
    assert decoder.model_format == "peft-arrow"


def test_runs_with_other_assumptions_never_share_a_file(seedless, tmp_path, monkeypatch):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path / "tasks", "humaneval", TASKS[:1])))
    options = {"backend": "peft_moe", "dtype": "float32", "max_new_tokens": 4, "greedy": True, "root": str(tmp_path / "out")}
    files = [run_codegen(str(seedless), "humaneval", assume={"rng_seed": seed}, **options) for seed in (1, 2, 1)]
    assert files[0] == files[2] != files[1]


def test_the_command_takes_statements_and_refuses_a_wrong_one_in_one_line(seedless, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path / "tasks", "humaneval", TASKS[:1])))
    words = ["codegen", "--model", str(seedless), "--dataset", "humaneval", "--root", str(tmp_path)]
    words += ["--greedy", "--dtype", "float32", "--max-new-tokens", "4"]
    assert main([*words, "--assume", "rng_seed=7"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()
    assert main([*words, "--assume", "seed=7"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
