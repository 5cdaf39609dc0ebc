"""The judge's options that are more than a word."""

from __future__ import annotations

import pytest

from harness.options import parser, reproduction
from harness.outcome import Unusable


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("1,3", (1, 3))])
def test_top_k_is_one_number_or_one_per_layer_and_is_reproduced_as_it_was_given(text, value):
    options = parser().parse_args(["--top-k", text])
    assert options.top_k == value
    assert f"--top-k {text}" in reproduction(options)


@pytest.mark.parametrize("text", ["two", "1,", "1.5"])
def test_top_k_that_is_no_integer_is_refused_in_one_line(text):
    with pytest.raises(Unusable, match="--top-k") as caught:
        parser().parse_args(["--top-k", text])
    assert "\n" not in str(caught.value)
