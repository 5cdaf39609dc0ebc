"""The judge's options that are more than a word."""

from __future__ import annotations

import shlex

from harness.cli import main
from harness.options import parser, reproduction
from harness.outcome import EXIT_UNUSABLE


def test_what_the_user_states_is_reproduced_as_it_was_given():
    words = ["--assume", "top_k=[2, 1]", "--assume", "rng_seed=42", "--device", "cpu"]
    again = shlex.split(reproduction(parser().parse_args(words)))
    assert parser().parse_args(again).assume == ["top_k=[2, 1]", "rng_seed=42"]


def test_a_statement_that_is_none_is_refused_in_one_line(tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path), "--assume", "seed=1"]) == EXIT_UNUSABLE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rng_seed" in error and "NAME=VALUE" in error
