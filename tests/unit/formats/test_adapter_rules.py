"""Which modules an adapter_config.json means, with which rank and alpha: against the functions by which PEFT itself decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from dylo_moe.formats.adapter_config import read_adapter_config
from dylo_moe.formats.files import CheckpointFiles
from tests.unit.formats import written

PATHS = (
    *(f"model.layers.{n}.{block}" for n in (0, 1, 10) for block in ("self_attn.q_proj", "self_attn.o_proj", "mlp.q_proj")),
    *("model.layers.1.mlp.experts.0.up_proj", "transformer.h.1.attn.c_attn", "h.1.c_attn", "layers.1.q_proj"),
    *("lm_head", "model.q_proj", "model.embed_tokens", "model.layers.0.mlp"),
)
NAMES = st.sampled_from(
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "layers.1.mlp.q_proj",
        "model.layers.10.self_attn.o_proj",
        "c_attn",
        "up_proj",
        "lm_head",
    ]
)
PATTERNS = st.sampled_from(
    [
        *PATHS[:4],
        "q_proj",
        "proj",
        ".*q_proj",
        r"layers\.(0|1)\..*",
        "^lm_head",
        "(self_attn|mlp).q_proj",
        r"1\..*",
        ".*",
        "[a-z_]+",
    ]
)
EXPRESSIONS = st.sampled_from(
    ["all-linear", ".*q_proj", r"model\.layers\.1\..*", ".*(q_proj|lm_head)", "q_proj", r".*\.\d+\..*o_proj"]
)
LISTS = st.lists(NAMES, min_size=1, max_size=3, unique=True)


@st.composite
def configs(draw):
    fields = {
        "r": 7,
        "lora_alpha": 11,
        "rank_pattern": draw(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3)),
        "target_modules": draw(EXPRESSIONS | LISTS),
        "exclude_modules": draw(st.none() | LISTS | st.sampled_from([".*q_proj", r"model\.layers\.0\..*"])),
        "modules_to_save": draw(st.none() | st.lists(st.sampled_from(["lm_head", "mlp", "q_proj"]), max_size=2)),
    }
    if isinstance(fields["target_modules"], list) and draw(st.booleans()):
        fields["layers_to_transform"] = draw(st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 10]), min_size=1, max_size=2))
        patterns = st.sampled_from(["layers", "h", "mlp|h", "[a-z]+", "experts"])
        fields["layers_pattern"] = draw(st.none() | patterns | st.lists(patterns, max_size=2))
    return fields


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("configuration")


@settings(max_examples=250, deadline=None)
@given(fields=configs())
def test_modules_ranks_and_alphas_are_those_that_peft_resolves(directory, fields):
    written.write_json(directory / "adapter_config.json", written.config(**fields))
    ours = read_adapter_config(CheckpointFiles(Path(directory)), directory / "adapter_config.json")
    theirs = LoraConfig(**{name: value for name, value in fields.items() if value is not None})
    for path in PATHS:
        if fields["target_modules"] != "all-linear" or fields["exclude_modules"] or fields["modules_to_save"]:
            expected = bool(check_target_module_exists(theirs, path))
            if fields["target_modules"] == "all-linear":  # PEFT puts the names of all Linears in its place beforehand
                theirs.target_modules = {path}
                expected = check_target_module_exists(theirs, path) is True
                theirs.target_modules = "all-linear"
            assert ours.covers(path) == expected, path
        assert ours.rank_of(path) == theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, path), theirs.r), path
        assert ours.alpha_of(path) == theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, path), theirs.lora_alpha)
