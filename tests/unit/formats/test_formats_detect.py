"""Which format a directory has, by what it holds; every pair of formats is in test_formats_pairs.py."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dylo_moe.errors import InvalidField, MissingFile, UnknownFormat
from dylo_moe.formats import detect_model_format, read_checkpoint
from tests.unit.formats import written


def _full_state(path):
    save_file(written.full_state(), path / "model.safetensors")


def _bag(path):
    for name in ("code", "maths"):
        written.write_adapter(path / name)


def _bundle(path):
    torch.save({"foundation_model": {}}, path / "checkpoint.pt")


WRITERS = {
    "dylo-moe": written.native,
    "dylora-separated": written.separated,
    "dylora-full-state": _full_state,
    "merged": written.base,
    "peft-lora": written.write_adapter,
    "lora-bag": _bag,
    "dylora-bundle": _bundle,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_layout_alone_is_detected(tmp_path, name):
    WRITERS[name](tmp_path)
    assert detect_model_format(tmp_path) == name


def test_adapters_beside_another_mark_decide_nothing_but_are_mentioned(tmp_path):
    written.write_adapter(tmp_path)
    _bag(tmp_path)
    assert any("code" in text for text in read_checkpoint(tmp_path).warnings)


def test_adapters_beside_a_router_are_refused(tmp_path):
    _bag(tmp_path)
    save_file(written.gate(), tmp_path / "router.safetensors")
    with pytest.raises(UnknownFormat, match="router.safetensors"):
        detect_model_format(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("XLORA", "peft-xlora"),
        ("MIXLORA", "mixlora"),
        ("LORAMOE", "moe-peft-loramoe"),
        ("MOLA", "moe-peft-mola"),
        ("MOLE", "adamole"),
        ("ADAMOLE", "adamole"),
        ("POLY", "peft-poly"),
        ("ADALORA", "peft-adalora"),
    ],
)
def test_other_tuners_are_told_by_their_peft_type(tmp_path, kind, name):
    written.write_adapter(tmp_path, peft_type=kind)
    assert detect_model_format(tmp_path) == name


@pytest.mark.parametrize("kind", ["IA3", "lora", None, 3, []])
def test_unknown_tuners_are_refused_with_the_known_ones(tmp_path, kind):
    written.write_adapter(tmp_path, peft_type=kind)
    with pytest.raises(UnknownFormat, match=rf"{re.escape(repr(kind))}.*XLORA"):
        detect_model_format(tmp_path)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["lora_route.weight", "lora_A0.weight"], "loramoe"),
        (["lora_route.weight", "lora_B0.weight"], "hydralora"),
        (["router.router.weight"], "mola"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_mixtures_that_call_themselves_lora_are_told_by_their_tensors(tmp_path, keys, name, pickled):
    tensors = written.pairs() | {f"base_model.model.{written.MODULES[0]}.{key}": torch.ones(2, 8) for key in keys}
    written.write_adapter(tmp_path, tensors)
    if pickled:
        torch.save(tensors, tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    assert detect_model_format(tmp_path) == name


def test_mergoo_arrow_and_standalone_xlora_are_told_by_their_files(tmp_path):
    written.base(tmp_path / "mergoo", adapter_configs=[], router_layers=["q_proj"], num_experts_per_tok=2)
    written.write_adapter(tmp_path / "peft-arrow" / "arrow_router")
    written.write_json(tmp_path / "xlora" / "xlora_config.json", {})
    for name in ("mergoo", "peft-arrow", "xlora"):
        assert detect_model_format(tmp_path / name) == name


def test_unknown_contents_are_listed_with_the_known_formats(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownFormat, match="notes.txt.*dylora-separated"):
        detect_model_format(tmp_path)
    with pytest.raises(UnknownFormat, match="ending"):
        detect_model_format(tmp_path / "notes.txt")


def test_nothing_there_is_a_missing_file(tmp_path):
    with pytest.raises(MissingFile, match="nowhere"):
        detect_model_format(tmp_path / "nowhere")


def test_detection_opens_no_pickle(tmp_path):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n.")
    assert detect_model_format(tmp_path) == "dylora-full-state"


def test_foreign_expert_name_in_peft_adapters_is_refused(tmp_path):
    written.separated(tmp_path)
    for name in ("code", "expert_01"):
        written.write_adapter(tmp_path / "peft_adapters" / name)
        with pytest.raises(InvalidField, match=name):
            read_checkpoint(tmp_path)
        shutil.rmtree(tmp_path / "peft_adapters" / name)
