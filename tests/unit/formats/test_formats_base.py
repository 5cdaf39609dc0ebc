"""The base model: found without guessing, validated before it is loaded, compared with the experts."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dylo_moe import errors
from dylo_moe.formats import check_experts_fit_base, read_checkpoint, resolve_base
from dylo_moe.formats.base import read_base
from tests.unit.formats import written


def test_given_base_wins_over_the_recorded_one(tmp_path):
    recorded, given = written.base(tmp_path / "a"), written.base(tmp_path / "b")
    assert resolve_base(str(recorded), str(given)) == str(given)
    assert resolve_base(str(recorded), "someone/some-model") == "someone/some-model"


def test_recorded_relative_path_is_looked_for_beside_the_checkpoint(tmp_path, monkeypatch):
    written.base(tmp_path / "base")
    (tmp_path / "checkpoint").mkdir()
    assert resolve_base("base", checkpoint=tmp_path / "checkpoint") == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("base") == "base"


@pytest.mark.parametrize(
    "recorded", [None, "", "someone/never-downloaded", "/nowhere/at/all", "a\0b", "../..", "x" * 300, "x" * 5000]
)
def test_unavailable_recorded_base_asks_for_base_model(tmp_path, recorded):
    with pytest.raises(errors.BaseModelUnknown, match="base_model="):
        resolve_base(recorded, checkpoint=tmp_path / "checkpoint")


def test_given_path_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(errors.BaseModelUnknown, match="nowhere"):
        resolve_base(None, str(tmp_path / "nowhere"))


def test_recorded_hub_id_is_used_from_the_local_cache_only(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--cached" / "snapshots" / "abc"
    written.base(snapshot)
    (tmp_path / "models--someone--cached" / "refs").mkdir()
    (tmp_path / "models--someone--cached" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert resolve_base("someone/cached") == str(snapshot)


CONFIG_DEFECTS = [
    ("layers", {"num_hidden_layers": 100_000}, errors.InvalidField, "num_hidden_layers"),
    ("negative layers", {"num_hidden_layers": -1}, errors.InvalidField, "num_hidden_layers"),
    ("more layers", {"num_hidden_layers": 3}, errors.ShapeMismatch, "num_hidden_layers"),
    ("fewer layers", {"num_hidden_layers": 1}, errors.ShapeMismatch, "num_hidden_layers"),
    ("no heads", {"num_attention_heads": 0}, errors.InvalidField, "num_attention_heads"),
    ("odd heads", {"num_attention_heads": 3}, errors.InvalidField, "hidden_size"),
    ("odd groups", {"num_key_value_heads": 3}, errors.InvalidField, "num_key_value_heads"),
    ("hidden", {"hidden_size": 16}, errors.ShapeMismatch, "embed_tokens"),
    ("vocabulary", {"vocab_size": 17}, errors.ShapeMismatch, "embed_tokens"),
    ("dtype", {"dtype": "float7"}, errors.InvalidField, "dtype"),
    ("NaN", {"rms_norm_eps": float("nan")}, errors.NonFiniteTensor, "rms_norm_eps"),
    ("text", {"hidden_size": "8"}, errors.InvalidField, "hidden_size"),
    ("no type", {"model_type": None}, errors.InvalidField, "model_type"),
    ("no head", {"tie_word_embeddings": False}, errors.ShapeMismatch, "lm_head"),
]


@pytest.mark.parametrize(
    ("fields", "kind", "word"), [case[1:] for case in CONFIG_DEFECTS], ids=[case[0] for case in CONFIG_DEFECTS]
)
def test_impossible_base_configuration_is_refused_by_field(tmp_path, fields, kind, word):
    path = written.base(tmp_path) / "config.json"
    read_base(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(kind, match=word):
        read_base(tmp_path)
    with pytest.raises(kind, match=word):
        read_checkpoint(tmp_path)


def test_configuration_that_names_code_is_a_warning(tmp_path):
    written.base(tmp_path, auto_map={"AutoModel": "x.Y"}, _attn_implementation="someone/kernel")
    assert len(read_base(tmp_path).warnings) == 2


def test_configuration_that_is_a_pipe_is_refused(tmp_path):
    (written.base(tmp_path) / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(errors.MissingFile, match="FIFO"):
        read_base(tmp_path)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": 16}}},
        {"model": {"vocab": [["a", 0.0]] * 17}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 16}]},
    ],
)
def test_tokenizer_beyond_the_embedding_is_refused(tmp_path, tokenizer):
    written.base(tmp_path)
    written.write_json(tmp_path / "tokenizer.json", {"model": {"vocab": {"a": 15}}})
    read_base(tmp_path)
    written.write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(errors.ShapeMismatch, match="token id 16"):
        read_base(tmp_path)


def fit(tmp_path, base, **options):
    written.native(tmp_path / "checkpoint")
    checkpoint = read_checkpoint(tmp_path / "checkpoint", **options)
    return check_experts_fit_base(base, checkpoint.experts, checkpoint.router)


def test_experts_of_this_base_fit(tmp_path):
    assert fit(tmp_path, written.base(tmp_path / "base")) == ()


def test_base_with_fewer_layers_lacks_the_module(tmp_path):
    with pytest.raises(errors.ShapeMismatch, match="layers.1"):
        fit(tmp_path, written.base(tmp_path / "base", layers=1))


def test_base_with_more_layers_has_modules_without_a_pair(tmp_path):
    with pytest.raises(errors.IncompletePair, match="layers.2"):
        fit(tmp_path, written.base(tmp_path / "base", layers=3))


def test_base_of_another_width_is_refused(tmp_path):
    base = written.base(tmp_path / "base", hidden_size=10)
    weights = {f"{module}.weight": torch.ones(8, 10) for module in written.MODULES}
    save_file(weights | {"model.embed_tokens.weight": torch.ones(16, 10)}, base / "model.safetensors")
    with pytest.raises(errors.ShapeMismatch, match="from 8 to 8.*from 10 to 8"):
        fit(tmp_path, base)


def test_gate_of_another_hidden_size_is_refused(tmp_path):
    written.native(tmp_path / "checkpoint", router={**written.moe_config()["router"], "hidden_size": 9})
    save_file(written.gate(2, 9), tmp_path / "checkpoint" / "router.safetensors")
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    base = written.base(tmp_path / "base")
    with pytest.raises(errors.ShapeMismatch, match="gate.weight.*9.*8"):
        check_experts_fit_base(base, checkpoint.experts, checkpoint.router)


def test_conv1d_weights_are_compared_transposed(tmp_path):
    base = tmp_path / "gpt2"
    written.write_json(base / "config.json", {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16})
    save_file({"h.0.attn.c_attn.weight": torch.ones(8, 24), "wte.weight": torch.ones(16, 8)}, base / "model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    for size, fits in ((24, True), (23, False)):
        tensors = {f"{key}A.weight": torch.ones(4, 8), f"{key}B.weight": torch.ones(size, 4)}
        path = written.write_adapter(tmp_path / f"lora{size}", tensors, target_modules=["c_attn"])
        experts = read_checkpoint(path).experts
        if fits:
            assert check_experts_fit_base(base, experts) == ()
        else:
            with pytest.raises(errors.ShapeMismatch, match="from 8 to 23"):
                check_experts_fit_base(base, experts)


def test_adapter_on_a_tied_head_is_compared_with_the_embedding(tmp_path):
    base = written.base(tmp_path / "base")
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 8),
        "base_model.model.lm_head.lora_B.weight": torch.ones(16, 4),
    }
    path = written.write_adapter(tmp_path / "lora", tensors, target_modules=["lm_head"])
    assert check_experts_fit_base(base, read_checkpoint(path).experts) == ()
