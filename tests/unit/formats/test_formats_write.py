"""write_native -> read_checkpoint is bitwise, atomic, and readable by stock PEFT."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from dylo_moe.errors import InvalidField, UnreadableFile
from dylo_moe.formats import Checkpoint, Expert, LoraPair, RouterState, detect_model_format, read_checkpoint, write_native
from tests.unit.formats import written


def mixture(dtype=torch.float32, **changes):
    """Two experts; ranks and alphas differ within the first, and the second adapts one layer only."""
    generator = torch.Generator().manual_seed(3)

    def pair(rank, alpha):
        shapes = ((rank, 8), (8, rank))
        return LoraPair(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), alpha)

    first = {module: pair(2 + number % 2, 4.0 + number) for number, module in enumerate(written.MODULES)}
    second = {module: pair(4, 0.5) for module in written.MODULES[:2]}
    settings = {
        "path": None,
        "format": "dylo-moe",
        "base_model": "base",
        "experts": (Expert("code", first, ("q_proj", "v_proj")), Expert("maths", second)),
        "router": RouterState(torch.randn(2, 8, generator=generator), torch.zeros(2), "all_experts", 2, 0.7),
        "load_balance": {"load_balance_loss_type": "switch", "router_aux_loss_coef": 0.05},
    }
    return Checkpoint(**{**settings, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_written_mixture_reads_back_bit_for_bit(tmp_path, dtype):
    source = mixture(dtype)
    copy = read_checkpoint(write_native(tmp_path / "new" / "directory", source))
    assert [expert.name for expert in copy.experts] == ["code", "maths"]
    for ours, theirs in zip(source.experts, copy.experts, strict=True):
        assert (ours.targets, list(ours.modules)) == (theirs.targets if ours.targets else (), sorted(theirs.modules))
        for module, pair in ours.modules.items():
            read = theirs.modules[module]
            assert torch.equal(read.lora_A, pair.lora_A)
            assert torch.equal(read.lora_B, pair.lora_B)
            assert (read.alpha, read.scaling, read.lora_A.dtype) == (pair.alpha, pair.scaling, dtype)
    assert torch.equal(copy.router.weight, source.router.weight)
    recorded = ("features", "top_k", "temperature")
    assert [getattr(copy.router, name) for name in recorded] == [getattr(source.router, name) for name in recorded]
    assert copy.load_balance == source.load_balance
    assert copy.warnings == ()


def test_writing_twice_gives_the_same_hashes(tmp_path):
    hashes = [read_checkpoint(write_native(tmp_path / name, mixture())).hashes for name in ("a", "b")]
    assert hashes[0] == hashes[1]


def test_router_none_round_trips(tmp_path):
    assert read_checkpoint(write_native(tmp_path / "bag", mixture(router=None))).router is None


def test_rank_stabilised_flag_round_trips(tmp_path):
    pair = replace(mixture().experts[1].modules[written.MODULES[0]], use_rslora=True)
    expert = Expert("one", {written.MODULES[0]: pair})
    copy = read_checkpoint(write_native(tmp_path / "x", mixture(experts=(expert,), router=None)))
    assert copy.experts[0].modules[written.MODULES[0]].scaling == pair.scaling


def test_expert_loads_in_stock_peft_with_every_rank_and_scaling(tmp_path):
    source = mixture()
    write_native(tmp_path / "native", source)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, **shape))
    for expert in source.experts:
        loaded = PeftModel.from_pretrained(model, tmp_path / "native" / "experts" / expert.name, adapter_name=expert.name)
        modules = dict(loaded.base_model.model.named_modules())
        adapted = [name for name, module in modules.items() if expert.name in getattr(module, "lora_A", {})]
        assert sorted(adapted) == sorted(expert.modules)
        for name, pair in expert.modules.items():
            assert torch.equal(modules[name].lora_A[expert.name].weight, pair.lora_A)
            assert modules[name].scaling[expert.name] == pair.scaling
        model = loaded.unload()


def test_earlier_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    target = write_native(tmp_path / "x", mixture())
    (target / "notes.txt").write_text("mine")
    only = mixture(experts=mixture().experts[:1], router=None)
    write_native(target, only)
    assert [expert.name for expert in read_checkpoint(target).experts] == ["code"]
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "router.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_foreign_directory_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidField, match="moe_config.json"):
        write_native(tmp_path, mixture())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_directory_is_used(tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    assert detect_model_format(write_native(target, mixture())) == "dylo-moe"


def test_failed_write_leaves_the_earlier_checkpoint(tmp_path):
    target = write_native(tmp_path / "x", mixture())
    before = read_checkpoint(target).hashes
    broken = mixture(load_balance={"router_aux_loss_coef": object()})
    with pytest.raises(TypeError):
        write_native(target, broken)
    assert read_checkpoint(target).hashes == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("name", ["", ".", "..", "a.b", "a/b", "keys", "a b", "x" * 200])
def test_impossible_expert_name_is_refused_before_writing(tmp_path, name):
    expert = replace(mixture().experts[0], name=name)
    with pytest.raises(InvalidField, match="name"):
        write_native(tmp_path / "x", mixture(experts=(expert,), router=None))
    assert list(tmp_path.iterdir()) == []


def test_no_experts_or_two_of_one_name_is_refused(tmp_path):
    for experts in ((), (mixture().experts[0],) * 2):
        with pytest.raises(InvalidField, match="experts"):
            write_native(tmp_path / "x", mixture(experts=experts, router=None))


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreadableFile, match="writable"):
        write_native(tmp_path / "file" / "below", mixture())


def test_tokenizer_files_are_copied(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    written.write_json(tokenizer / "tokenizer.json", {"model": {}})
    written.write_json(tokenizer / "other.json", {})
    target = write_native(tmp_path / "x", mixture(tokenizer=tokenizer))
    assert json.loads((target / "tokenizer.json").read_text()) == {"model": {}}
    assert not (target / "other.json").exists()
    assert read_checkpoint(target).tokenizer == target


def test_written_directory_has_the_users_usual_permissions(tmp_path):
    target = write_native(tmp_path / "x", mixture())
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask
