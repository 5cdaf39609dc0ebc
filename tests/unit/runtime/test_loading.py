"""Every layout of the same experts and router loads and computes the same thing; only what a layout cannot say may differ."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from dylo_moe import detect_model_format, load_checkpoint
from dylo_moe.errors import BaseModelUnknown, RoutingError
from dylo_moe.formats import read_checkpoint, write_native
from fixtures.layouts import LAYOUTS, write_layout
from harness.specimens import write_base, write_checkpoint

NUM_EXPERTS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("layouts") / "llama", "llama")


def digest(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(layout, path: Path, base: Path):
    options = {} if layout.records_base else {"base_model": str(base)}
    return load_checkpoint(path, **options, **layout.options)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.num_experts != 0], ids=lambda layout: layout.name)
def test_layout_loads_and_equals_the_native_layout_expert_by_expert(layout, base, tmp_path, ids):
    path = write_layout(tmp_path / "layout", base, layout.name, num_experts=NUM_EXPERTS)
    reference = load_checkpoint(write_layout(tmp_path / "bag", base, "lora-bag", num_experts=NUM_EXPERTS))
    before = digest(path)
    model = load(layout, path, base)
    assert detect_model_format(path) == layout.format
    assert digest(path) == before
    experts = layout.num_experts or NUM_EXPERTS
    assert model.num_experts == experts
    with torch.no_grad():
        for e in range(experts):
            assert torch.equal(model(ids, expert_id=e).logits, reference(ids, expert_id=e).logits)
        if layout.has_router:
            model(ids)
            assert model.last_routing_weights.shape == (3, 9, experts)
        else:
            with pytest.raises(RoutingError, match="no router"):
                model(ids)


def test_numbered_experts_in_another_order_keep_the_routers_columns(base, tmp_path, ids):
    forward = read_checkpoint(write_checkpoint(tmp_path / "a", base, num_experts=NUM_EXPERTS))
    router = replace(forward.router, weight=forward.router.weight.flip(0), bias=forward.router.bias.flip(0))
    backward = write_native(tmp_path / "b", replace(forward, experts=forward.experts[::-1], router=router))
    first, second = load_checkpoint(tmp_path / "a"), load_checkpoint(backward)
    assert second.expert_names == ["0_expert_2", "1_expert_1", "2_expert_0"]
    assert any("expert_2, expert_1, expert_0" in line for line in second.checkpoint.warnings)
    with torch.no_grad():
        assert torch.equal(first(ids, expert_id=0).logits, second(ids, expert_id=2).logits)
        assert (first(ids).logits - second(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.has_router], ids=lambda layout: layout.name)
def test_every_routed_layout_routes_alike(layout, base, tmp_path, ids):
    model = load(layout, write_layout(tmp_path / "a", base, layout.name, num_experts=NUM_EXPERTS), base)
    other = load(LAYOUTS[8], write_layout(tmp_path / "b", base, LAYOUTS[8].name, num_experts=NUM_EXPERTS), base)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
        assert torch.equal(model.last_routing_weights, other.last_routing_weights)
    assert model.features == "all_experts"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.num_experts == 0], ids=lambda layout: layout.name)
def test_merged_layout_loads_as_a_plain_model_of_the_bases_type(layout, base, tmp_path, ids):
    path = write_layout(tmp_path / "layout", base, layout.name, num_experts=NUM_EXPERTS)
    before = digest(path)
    model = load(layout, path, base)
    assert isinstance(model, PreTrainedModel)
    assert model.config.model_type == "llama"
    with torch.no_grad():
        merged, plain = model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert not torch.allclose(merged, plain)
    assert digest(path) == before


def test_base_model_given_as_object_is_used_as_it_is(base, tmp_path, ids):
    path = write_checkpoint(tmp_path / "c", base, num_experts=2)
    ours = AutoModelForCausalLM.from_pretrained(base)
    model = load_checkpoint(path, base_model=ours)
    assert model.causal_lm is ours
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_checkpoint(path)(ids).logits)


def test_unknown_base_model_is_never_guessed_or_fetched(base, tmp_path):
    path = write_checkpoint(tmp_path / "c", base, num_experts=2)
    for config in path.rglob("*config.json"):
        config.write_text(config.read_text().replace(str(base), "some-org/some-model"))
    with pytest.raises(BaseModelUnknown, match="some-org/some-model.*base_model="):
        load_checkpoint(path)
    assert load_checkpoint(path, base_model=str(base)).num_experts == 2


def test_dtype_and_router_options_are_followed(base, tmp_path, ids):
    path = write_checkpoint(tmp_path / "c", base, num_experts=4)
    model = load_checkpoint(path, dtype="bfloat16", top_k=3, router_features="embedding", temperature=0.5)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    assert (model.last_routing_weights != 0).sum(-1).eq(3).all()
    assert (model.features, model.router.temperature) == ("embedding", 0.5)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype_on_a_base_of_16_bits_is_pefts(base, tmp_path, ids, autocast):
    path = write_checkpoint(tmp_path / "moe", base, num_experts=NUM_EXPERTS, top_k=2)
    model = load_checkpoint(path, dtype="bfloat16", autocast_adapter_dtype=autocast)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"), path / "experts/expert_0", autocast_adapter_dtype=autocast
    ).eval()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32 if autocast else torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(ids, expert_id=0).logits, stock(ids).logits)
        model(ids)
    assert model.router.gate.weight.dtype == torch.float32


def test_loading_emits_no_warning_of_peft_or_transformers(base, tmp_path):
    path = write_checkpoint(tmp_path / "c", base, num_experts=2, targets="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(path)


def test_half_precision_router_computes_in_float32(base, tmp_path, ids):
    path = write_checkpoint(tmp_path / "c", base, num_experts=2, dtype="bfloat16")
    model = load_checkpoint(path)
    assert model.router.gate.weight.dtype == torch.float32
    with torch.no_grad():
        hidden = model.train()(ids, use_cache=False)
        assert hidden.logits.dtype == torch.float32
    assert (model.last_routing_weights.sum(-1) - 1).abs().max() < 1e-6
