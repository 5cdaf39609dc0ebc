"""Experts that are more than a pair per Linear: each against stock PEFT with that adapter alone, mixed against the definition."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dylo_moe import DynamicHybridRouter, MoELoraConfig, attach_router, detach_router, load_checkpoint
from dylo_moe.conversion import convert_checkpoint
from dylo_moe.errors import ConversionError, ForeignTensor, InvalidField, RoutingError, ShapeMismatch
from dylo_moe.formats import read_checkpoint
from tests.unit.runtime.tiny_peft import VOCABULARY, load, logits, stock, write_adapter, write_bases

PLAIN = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
GPT2 = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
# base, experts, whether every output is bitwise the one of stock PEFT
BAGS = {
    "rsLoRA": ("llama", [{**PLAIN, "use_rslora": True}, PLAIN], True),
    "DoRA": ("qwen", [{**PLAIN, "use_dora": True}, {**PLAIN, "r": 5}, {**PLAIN, "use_dora": True, "use_rslora": True}], True),
    "DoRA on Conv1D": ("gpt2", [{**GPT2, "use_dora": True}, GPT2], True),
    "patterns": ("llama", [{**PLAIN, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {".*[01].mlp.up_proj": 5}}, PLAIN], True),
    "layers": (
        "llama",
        [
            {**PLAIN, "layers_to_transform": 1},
            {**PLAIN, "layers_to_transform": [0], "layers_pattern": "layers"},
            {"r": 2, "target_modules": "all-linear", "exclude_modules": ["v_proj"]},
            {"r": 2, "target_modules": r".*\.1\..*[qv]_proj"},
        ],
        True,
    ),
    "readout": ("qwen", [{"r": 2, "target_modules": ["q_proj", "lm_head"]}, PLAIN], True),
    "lora_bias": ("qwen", [{**PLAIN, "lora_bias": True}, PLAIN, {**PLAIN, "lora_bias": True}], True),
    "biases": ("qwen", [{**PLAIN, "bias": "all"}, {**PLAIN, "bias": "lora_only"}, PLAIN], False),
    "biases of norms": ("gpt2", [{**GPT2, "bias": "all"}, GPT2], False),
    "biases and DoRA": ("qwen", [{**PLAIN, "use_dora": True, "bias": "all"}, {**PLAIN, "bias": "lora_only"}], False),
    "saved modules": (
        "qwen",
        [
            {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]},
            {**PLAIN, "modules_to_save": ["head", "model.norm"], "use_dora": True},
            PLAIN,
        ],
        True,
    ),
    "saved modules, tied": (
        "llama",
        [
            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        ],
        True,
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def bags(bases, tmp_path_factory):
    """Name -> directory with one adapter per expert, written on first use."""
    root, made = tmp_path_factory.mktemp("bags"), {}

    def bag(name):
        if name not in made:
            base, experts, _ = BAGS[name]
            made[name] = root / str(len(made))
            for e, config in enumerate(experts):
                write_adapter(made[name] / f"expert_{e}", bases / base, seed=e, **config)
        return made[name], bases / BAGS[name][0]

    return bag


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", BAGS)
def test_each_expert_alone_equals_stock_peft(bags, ids, name):
    directory, base = bags(name)
    model, plain = load_checkpoint(directory, base_model=str(base)), logits(load(base), ids)
    for e, expert in enumerate(model.expert_names):
        wanted = logits(stock(directory / expert, base), ids)
        assert (wanted - plain).abs().max() > 1e-3
        got = logits(model, ids, expert_id=e)
        assert torch.equal(got, wanted) if BAGS[name][2] else (got - wanted).abs().max() < 1e-6
        one_hot = torch.eye(model.num_experts)[e]
        assert (logits(model, ids, routing_weights=one_hot) - wanted).abs().max() < 2e-6
    assert torch.equal(logits(model, ids, routing_weights=torch.zeros(model.num_experts)), plain)


@pytest.mark.parametrize("name", ["DoRA", "patterns", "lora_bias", "biases", "biases of norms", "saved modules"])
def test_saved_natively_it_is_bitwise_the_same_and_stock_peft_reads_each_expert(bags, ids, name, tmp_path):
    directory, base = bags(name)
    model = load_checkpoint(directory, base_model=str(base))
    model.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved", base_model=str(base))
    weights = torch.rand(2, 7, model.num_experts)
    assert torch.equal(logits(model, ids, routing_weights=weights), logits(again, ids, routing_weights=weights))
    for expert in model.expert_names:
        written = stock(tmp_path / "saved" / "experts" / expert, base)
        assert (logits(written, ids) - logits(stock(directory / expert, base), ids)).abs().max() < 1e-6
        original = load_file(directory / expert / "adapter_model.safetensors")
        copied = load_file(tmp_path / "saved" / "experts" / expert / "adapter_model.safetensors")
        assert original.keys() - copied.keys() == set() or "bias" in name  # biases of Linears that PEFT has wrapped
        assert all(torch.equal(tensor, copied[key]) for key, tensor in original.items() if key in copied)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def test_dora_mixture_equals_the_equation_in_float64(bags, ids):
    directory, base = bags("DoRA")
    model = load_checkpoint(directory, base_model=str(base)).double()
    layer = model.routed_layers()["model.layers.0.self_attn.q_proj"]
    x, w = torch.randn(2, 7, layer.in_features).double(), torch.rand(2, 7, 3).double()
    weight, bias = array(layer.base_layer.weight), array(layer.base_layer.bias)
    wanted = base_output = array(x) @ weight.T + bias
    for e, name in enumerate(model.expert_names):
        delta = layer.scaling[name] * array(layer.lora_B[name].weight) @ array(layer.lora_A[name].weight)
        changed = weight + delta
        if name in layer.lora_magnitude_vector:
            length = np.linalg.norm(changed, axis=1, keepdims=True)
            changed = array(layer.lora_magnitude_vector[name].weight)[:, None] / length * changed
        wanted = wanted + array(w)[..., e : e + 1] * (array(x) @ changed.T + bias - base_output)
    assert np.abs(array(layer.mix(x, w)) - wanted).max() < 1e-12


def test_saved_module_and_bias_mixtures_equal_the_definition(bags, ids):
    directory, base = bags("saved modules")
    model = load_checkpoint(directory, base_model=str(base)).double()
    head, w = model.causal_lm.lm_head, torch.rand(2, 7, 3).double()
    x = torch.randn(2, 7, 32).double()
    with torch.no_grad(), model.mixture.using(w):
        versions = [head.modules_to_save[name](x) for name in model.expert_names[:2]]
        plain = head.original_module(x)
        wanted = plain + sum(w[..., e : e + 1] * (version - plain) for e, version in enumerate(versions))
        assert (head(x) - wanted).abs().max() < 1e-12
    directory, base = bags("biases of norms")
    model = load_checkpoint(directory, base_model=str(base)).double()
    norm = model.causal_lm.transformer.h[0].ln_1
    with torch.no_grad():
        with model.mixture.using(None):
            plain = norm(x[..., :16])
        with model.mixture.using(w[..., :2]):
            change = norm.expert_bias.versions["expert_0"] - norm.bias
            assert (norm(x[..., :16]) - plain - w[..., :1] * change).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["DoRA", "saved modules", "biases"])
def test_generation_with_one_expert_equals_stock_peft_token_for_token(bags, ids, name):
    directory, base = bags(name)
    model = load_checkpoint(directory, base_model=str(base))
    for e, expert in enumerate(model.expert_names):
        wanted = stock(directory / expert, base).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(ids, strategy=f"single:{e}", max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize("features", ["base", "embedding"])
def test_cached_generation_by_a_router_equals_recomputation(bags, ids, features):
    directory, base = bags("saved modules")
    plain = load_checkpoint(directory, base_model=str(base))
    peft_model = detach_router(plain)
    config = MoELoraConfig(num_experts=3, top_k_experts=2, router_features=features)
    model = attach_router(peft_model, DynamicHybridRouter(32, 3, 2).eval(), config)
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])])
def test_own_head_sees_the_weights_of_the_kept_positions(bags, ids, kept):
    directory, base = bags("saved modules")
    model = load_checkpoint(directory, base_model=str(base))
    weights = torch.rand(2, 7, 3)
    whole = logits(model, ids, routing_weights=weights)
    part = logits(model, ids, routing_weights=weights, logits_to_keep=kept)
    assert (part - (whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:])).abs().max() < 1e-6


def peft_with(base, *configs):
    torch.manual_seed(1)
    model = None
    for e, config in enumerate(configs):
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)
        if model is None:
            model = get_peft_model(load(base), config, adapter_name=f"expert_{e}")
        else:
            model.add_adapter(f"expert_{e}", config)
    return model.eval()


def test_attached_to_a_stock_model_it_is_mixed_and_detached_it_is_as_before(bases, ids):
    peft_model = peft_with(bases / "qwen", {**PLAIN, "use_dora": True, "modules_to_save": ["lm_head"]}, PLAIN)
    peft_model.base_model.model.lm_head.modules_to_save["expert_0"].weight.data += 1
    before = {name: (type(module), dict(module.__dict__)) for name, module in peft_model.named_modules()}
    wanted, trainable = logits(peft_model, ids), {n: p.requires_grad for n, p in peft_model.named_parameters()}
    model = attach_router(peft_model, None, MoELoraConfig(num_experts=2))
    assert len(model.notes) == 2 and "expert_0: DoRA" in model.notes[0] and "lm_head" in model.notes[1]
    assert torch.equal(logits(model, ids, expert_id=0), wanted)
    assert not torch.equal(logits(model, ids, expert_id=1), wanted)
    detached = detach_router(model)
    assert detached is peft_model and torch.equal(logits(detached, ids), wanted)
    assert trainable == {n: p.requires_grad for n, p in detached.named_parameters()}
    after = {name: (type(module), module.__dict__) for name, module in detached.named_modules()}
    assert after.keys() == before.keys()
    for name, (kind, state) in before.items():
        assert after[name][0] is kind
        assert after[name][1].keys() == state.keys()
        assert {key: hooks for key, hooks in after[name][1].items() if key.endswith("_hooks") and hooks} == {}


@pytest.mark.parametrize("name", ["DoRA", "lora_bias", "biases", "saved modules"])
def test_gradients_reach_every_tensor_of_every_expert_and_none_of_the_base(bags, ids, name):
    directory, base = bags(name)
    model = load_checkpoint(directory, base_model=str(base))
    model(ids, labels=ids, routing_weights=torch.full((model.num_experts,), 0.4)).loss.backward()
    own = ("lora_", "modules_to_save", "expert_bias")
    for key, parameter in model.peft_model.named_parameters():
        is_own = any(word in key for word in own)
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == is_own, key
    model.expert_manager.set_active_expert(0)
    trained = {key for key, parameter in model.peft_model.named_parameters() if parameter.requires_grad}
    assert trained and all("expert_0" in key for key in trained)


def test_what_a_single_routing_cannot_weigh_is_refused(bases, bags, ids):
    saved = {**PLAIN, "modules_to_save": ["lm_head"]}
    peft_model = peft_with(bases / "qwen", saved, saved)
    with pytest.raises(RoutingError, match="own lm_head, for which a router per layer"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=2, router_features="layer"))
    with pytest.raises(RoutingError, match="shared adapter expert_1 has its own lm_head"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=1, shared_adapter="expert_1"))
    model = attach_router(peft_model, None, MoELoraConfig(num_experts=2))
    with pytest.raises(RoutingError, match="one routing for all layers"):
        logits(model, ids, routing_weights=torch.rand(2, 7, model.mixture.num_layers, 2))
    directory, base = bags("biases")
    with pytest.raises(RoutingError, match="biases of their own"):
        detach_router(load_checkpoint(directory, base_model=str(base)))


def test_adapter_inside_a_saved_module_is_refused_by_name(bases):
    peft_model = peft_with(bases / "llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]})
    mlp = peft_model.base_model.model.model.layers[0].mlp.modules_to_save["expert_0"]
    mlp.up_proj = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(RoutingError, match="layers.0.mlp is in modules_to_save and has adapters inside"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=1))


def test_adapter_on_a_module_that_another_expert_has_whole_is_refused_by_name(bases, tmp_path):
    write_adapter(tmp_path / "a", bases / "qwen", seed=0, r=2, target_modules=["q_proj", "o_proj"])
    write_adapter(tmp_path / "b", bases / "qwen", seed=1, **PLAIN, modules_to_save=["o_proj"])
    with pytest.raises(ForeignTensor, match="a: model.layers.0.self_attn.o_proj: .*b has its own version"):
        load_checkpoint(tmp_path, base_model=str(bases / "qwen"))


def test_own_module_of_another_size_than_the_base_is_refused(bases, tmp_path):
    write_adapter(tmp_path / "a", bases / "qwen", seed=0, **PLAIN, modules_to_save=["lm_head"])
    other = load(bases / "qwen")
    other.resize_token_embeddings(VOCABULARY + 4)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ShapeMismatch, match="default: lm_head.weight"):
        load_checkpoint(tmp_path / "a", base_model=str(tmp_path / "other"))


def test_bias_of_a_module_without_one_is_refused(bases, tmp_path):
    write_adapter(tmp_path / "a", bases / "qwen", seed=0, **PLAIN, bias="all")
    with pytest.raises(ShapeMismatch, match="default: bias: .*no bias"):
        load_checkpoint(tmp_path / "a", base_model=str(bases / "llama"))


@pytest.mark.parametrize(
    ("drop", "word"), [("lora_magnitude_vector", "use_dora"), ("lm_head", "modules_to_save")], ids=["magnitude", "module"]
)
def test_file_without_what_the_configuration_names_is_refused(bases, tmp_path, drop, word):
    from safetensors.torch import save_file

    write_adapter(tmp_path, bases / "qwen", seed=0, **PLAIN, use_dora=True, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if drop not in key}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidField, match=word):
        load_checkpoint(tmp_path, base_model=str(bases / "qwen"))


def test_two_bags_of_which_one_has_dora_are_told_apart_by_their_warnings(bags):
    directory, base = bags("DoRA")
    assert "expert_0, expert_2: DoRA" in load_checkpoint(directory, base_model=str(base)).checkpoint.warnings[-1]
    directory, base = bags("rsLoRA")
    assert not any("DoRA" in line for line in load_checkpoint(directory, base_model=str(base)).checkpoint.warnings)


def test_stock_biases_of_an_attached_model_are_refused_with_the_way_out(bases):
    peft_model = get_peft_model(load(bases / "qwen"), LoraConfig(**PLAIN, bias="lora_only"))
    assert isinstance(peft_model, PeftModel)
    with pytest.raises(RoutingError, match="bias='lora_only'.*load_checkpoint"):
        attach_router(peft_model, None, MoELoraConfig(num_experts=1))


def test_a_base_weight_that_peft_saved_beside_a_readout_is_compared_and_forgotten(bags):
    directory, base = bags("readout")
    (name,) = repeated_keys(directory / "expert_0")
    for dtype in (None, torch.bfloat16):
        model = load_checkpoint(directory, base_model=str(base), dtype=dtype)
        assert not any(expert.repeated for expert in model.checkpoint.experts)
        assert [w for w in model.checkpoint.warnings if "lm_head.weight" in w] == [
            "expert_0 repeats the base weight lm_head.weight, which is the base model's own"
        ], name


@pytest.mark.parametrize("change", [lambda t: t * (1 + 1e-6), lambda t: t[:-1].contiguous()])
def test_a_base_weight_that_is_not_the_base_models_is_refused(bags, tmp_path, change):
    directory, base = bags("readout")
    copied = shutil.copytree(directory, tmp_path / "bag")
    (name,) = repeated_keys(copied / "expert_0")
    file = copied / "expert_0" / "adapter_model.safetensors"
    save_file({key: change(t) if key == name else t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ForeignTensor, match="expert_0: lm_head.weight: found a base weight that is not the base model's"):
        load_checkpoint(copied, base_model=str(base))


def test_a_base_weight_of_a_module_without_a_pair_is_refused(bags, tmp_path):
    directory, base = bags("patterns")
    copied = shutil.copytree(directory, tmp_path / "bag")
    file = copied / "expert_0" / "adapter_model.safetensors"
    extra = {"base_model.model.lm_head.base_layer.weight": torch.ones(3, 3)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    with pytest.raises(ForeignTensor, match="lm_head.base_layer.weight"):
        load_checkpoint(copied, base_model=str(base))


def test_conversion_leaves_comparing_base_weights_to_loading(bags, tmp_path):
    directory, base = bags("readout")
    with pytest.raises(ConversionError, match="expert_0: lm_head.weight.*save_pretrained"):
        convert_checkpoint(read_checkpoint(directory), tmp_path / "out", to="dylora")
    load_checkpoint(directory, base_model=str(base)).save_pretrained(tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved", base_model=str(base)).checkpoint.format == "dylo-moe"


def repeated_keys(directory) -> list[str]:
    return [key for key in load_file(directory / "adapter_model.safetensors") if ".base_layer." in key]
