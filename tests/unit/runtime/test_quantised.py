"""Experts on base models in 4 and 8 bits (bitsandbytes on the CPU), against stock PEFT on the same base."""

from __future__ import annotations

import json
from tempfile import TemporaryDirectory

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dylo_moe import DynamicHybridRouter, attach_router, detach_router, load_checkpoint
from dylo_moe.errors import InvalidField, OptionError, ShapeMismatch
from dylo_moe.quantised import keep_layout
from tests.unit.runtime.tiny_peft import VOCABULARY, load, logits, stock, write_adapter, write_bases

TARGETS = {"target_modules": ["q_proj", "up_proj"]}
EXPERTS = [{"r": 3, **TARGETS}, {"r": 2, **TARGETS, "use_dora": True}, {"r": 2, **TARGETS, "modules_to_save": ["lm_head"]}]
KINDS = {
    "nf4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32), None),
    "nf4, bfloat16": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16), torch.bfloat16),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), None),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def bag(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("bag")
    for e, config in enumerate(EXPERTS):
        write_adapter(root / f"expert_{e}", bases / "qwen", seed=e, **config)
    return root


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


def quantised(bases, kind):
    """Computed as on any processor: bitsandbytes cannot lay out weights as small as these for AVX512-BF16."""
    config, dtype = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(bases / "qwen", quantization_config=config, dtype=dtype or "auto")
    keep_layout(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_equals_stock_peft_however_the_base_was_quantised(bases, bag, ids, tmp_path, kind):
    quantised(bases, kind).save_pretrained(tmp_path)
    config, dtype = KINDS[kind]
    ways = {
        "a loaded model": {"base_model": quantised(bases, kind)},
        "a stored one": {"base_model": str(tmp_path)},
        "while loading": {"base_model": str(bases / "qwen"), "quantization_config": config, "dtype": dtype},
    }
    wanted = [logits(stock(bag / f"expert_{e}", quantised(bases, kind)), ids) for e in range(len(EXPERTS))]
    for way, options in ways.items():
        model = load_checkpoint(bag, **options)
        base_layer = model.routed_layers()["model.layers.0.self_attn.q_proj"].base_layer
        assert type(base_layer).__name__ in ("Linear4bit", "Linear8bitLt")
        for _ in range(2):  # the second pass, too
            for e, expected in enumerate(wanted):
                assert torch.equal(logits(model, ids, expert_id=e), expected), (way, e)
        assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_is_the_base_layers_own_output_and_the_weighted_deltas(bases, bag, kind):
    model = load_checkpoint(bag, base_model=quantised(bases, kind))
    layer = model.routed_layers()["model.layers.1.mlp.up_proj"]
    x, w = torch.randn(2, 7, 32, dtype=model.dtype), torch.rand(2, 7, 3)
    with torch.no_grad():
        base = layer.base_layer(x).double()
        expected = base.clone()
        for e in range(model.num_experts):
            with model.mixture.using(e):
                expected += w[..., e : e + 1] * (layer(x).double() - base)
        # Rounded to the base's dtype once for each DoRA expert, once for the others together, and once in each expert alone.
        bound = 6 * torch.finfo(model.dtype).eps * expected.abs().max()
        assert (expected - base).abs().max() > 0.1
        assert (layer.mix(x, w).double() - expected).abs().max() < bound


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stock_model_is_routed_trained_and_given_back(bases, bag, ids, kind):
    peft_model = stock(bag / "expert_0", quantised(bases, kind))
    peft_model.load_adapter(bag / "expert_0", adapter_name="second")
    wanted = logits(peft_model, ids)
    model = attach_router(peft_model, DynamicHybridRouter(32, 2, 2).eval())
    weights_before = model.routed_layers()["model.layers.0.self_attn.q_proj"].base_layer.weight.data.clone()
    assert (logits(model, ids) - wanted).abs().max() < 1e-5  # equal experts
    model.expert_manager.activate_all_experts()
    model(ids, labels=ids).loss.backward()
    own = {n: p for n, p in model.peft_model.named_parameters() if "lora_" in n}
    assert all(parameter.grad is not None for parameter in own.values())
    assert torch.equal(model.routed_layers()["model.layers.0.self_attn.q_proj"].base_layer.weight.data, weights_before)
    assert torch.equal(logits(detach_router(model), ids), wanted)


def test_saved_model_loads_on_a_base_quantised_otherwise(bases, bag, ids, tmp_path):
    model = load_checkpoint(bag, base_model=quantised(bases, "nf4"))
    model.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved", base_model=quantised(bases, "nf4"))
    assert torch.equal(logits(again, ids, expert_id=1), logits(model, ids, expert_id=1))
    load_checkpoint(tmp_path / "saved", base_model=str(bases / "qwen"))


def with_method(bases, directory, **quantization):
    config = json.loads((bases / "qwen" / "config.json").read_text())
    load(bases / "qwen").save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return str(directory)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "aqlm"}, ["aqlm is not installed", "pip install aqlm"]),
        ({"quant_method": "made_up"}, ["quant_method", "'made_up'", "bitsandbytes"]),
        ({"bits": 4}, ["quant_method", "None"]),
    ],
)
def test_method_that_cannot_run_here_is_refused_in_one_line(bases, bag, tmp_path, quantization, words):
    with pytest.raises(InvalidField) as refused:
        load_checkpoint(bag, base_model=with_method(bases, tmp_path, **quantization))
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words)


def test_options_that_contradict_one_another_are_refused(bases, bag):
    with pytest.raises(OptionError, match="loaded already"):
        load_checkpoint(bag, base_model=load(bases / "qwen"), quantization_config=KINDS["nf4"][0])
    with pytest.raises(InvalidField, match="gptqmodel"):
        load_checkpoint(bag, base_model=str(bases / "qwen"), quantization_config=AwqConfig())


def test_expert_on_a_module_that_a_packed_base_does_not_have_is_refused(bases, tmp_path):
    quantised(bases, "nf4").save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "expert", bases / "gpt2", seed=0, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ShapeMismatch, match="c_attn: found an adapter on a module that base does not have"):
        load_checkpoint(tmp_path / "expert", base_model=str(tmp_path / "base"))


def laid_out(base_model):
    """As after a first pass on a CPU with AVX512-BF16, where it can be laid out."""
    layers = [module for module in base_model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
        weight = layer.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    return layers


@pytest.mark.parametrize("is_laid_out", [False, True])
def test_a_layout_that_only_some_processors_have_is_undone_and_given_back(is_laid_out):
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with TemporaryDirectory() as directory:
        LlamaForCausalLM(LlamaConfig(**config, vocab_size=VOCABULARY)).save_pretrained(directory)
        base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=KINDS["nf4"][0], dtype=torch.float32)
    projection = base.model.layers[0].self_attn.q_proj
    before = dequantize_module_weight(projection)
    layers = laid_out(base) if is_laid_out else [projection]
    projection.support_avx512bf16_for_cpu = True
    peft_model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)).eval()
    model = attach_router(peft_model, DynamicHybridRouter(64, 1))
    ids = torch.tensor([[1, 2, 3]])
    first = logits(model, ids)
    assert torch.equal(logits(model, ids), first)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    found = dequantize_module_weight(projection)
    # Laid out, the scales of 64 weights were rounded to bfloat16.
    assert (found - before).abs().max() <= before.abs().max() * torch.finfo(torch.bfloat16).eps * is_laid_out
    detach_router(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
