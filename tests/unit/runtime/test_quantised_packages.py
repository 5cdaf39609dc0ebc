"""Experts on base models that torchao, HQQ and gptqmodel (GPTQ, AWQ) quantised, each where its package is installed."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from dylo_moe import DyLoRA_MoE, DynamicHybridRouter, attach_router, load_checkpoint
from dylo_moe.routed import RoutedLinear
from harness.specimens import write_base
from tests.unit.runtime.tiny_peft import load, logits, stock, write_adapter

HIDDEN = 128  # what gptqmodel's kernels need
IDS = torch.arange(8, 26).view(2, 9)
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = [{"r": 3, "lora_alpha": 6}, {"r": 5, "lora_alpha": 4}, {"r": 2, "use_rslora": True}]
PACKAGES = {"torchao": "torchao", "hqq": "hqq", "gptq": "gptqmodel", "awq": "gptqmodel"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = write_base(tmp_path_factory.mktemp("base"), "llama")  # for its tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bag(base, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bag")
    for e, config in enumerate(EXPERTS):
        write_adapter(root / f"expert_{e}", base, seed=e, target_modules=TARGETS, **config)
    return root


@pytest.fixture(scope="module", params=PACKAGES)
def stored(request, base, tmp_path_factory) -> tuple[str, str | PreTrainedModel]:
    """What quantised it, and the quantised base: a directory, or a model where transformers reads none of that kind."""
    kind, directory = request.param, tmp_path_factory.mktemp(request.param)
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        pytest.skip(f"{kind}: the package {PACKAGES[kind]} is not installed")
    if PACKAGES[kind] == "gptqmodel" and os.cpu_count() < 3:
        pytest.skip(f"{kind}: gptqmodel 7.7 loads no model on {os.cpu_count()} processors, it needs three")
    return kind, {"torchao": by_torchao, "hqq": by_hqq}.get(kind, by_gptqmodel)(base, directory)


def by_torchao(base: Path, directory: Path) -> str:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    LlamaForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(directory)
    return str(directory)


def by_hqq(base: Path, directory: Path) -> PreTrainedModel:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = load(base)
    how = BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(model, how, compute_dtype=torch.float32, device="cpu")
    return model


def by_gptqmodel(base: Path, directory: Path) -> str:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import AWQConfig
    from transformers import AutoTokenizer

    how = AWQConfig if directory.name.startswith("awq") else QuantizeConfig
    model = GPTQModel.load(str(base), how(bits=4, group_size=32, device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.quantize([dict(tokenizer(f"def f(x):\n    return x + {n}  # adds {n}, for the test")) for n in range(64)], batch_size=4)
    model.save(str(directory))
    return str(directory)


def quantised(place: str | PreTrainedModel) -> PreTrainedModel:
    """In float32: in 16 bits PEFT's layer for AWQ rounds the delta once more than its others do."""
    if isinstance(place, PreTrainedModel):
        return copy.deepcopy(place)
    return LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)


def test_each_expert_alone_equals_stock_peft(stored, base, bag):
    kind, place = stored
    model = load_checkpoint(bag, base_model=quantised(place))
    again = load_checkpoint(bag, place, torch.float32) if isinstance(place, str) else model
    whole = logits(load(base), IDS)
    for e in range(len(EXPERTS)):
        want = logits(stock(bag / f"expert_{e}", quantised(place)), IDS)
        assert torch.equal(logits(model, IDS, expert_id=e), want), kind
        assert torch.equal(logits(again, IDS, expert_id=e), want), kind
        assert (want - whole).abs().max() > 0.1
    bare = quantised(place)
    assert not torch.equal(logits(bare, IDS), whole)  # it is quantised
    assert torch.equal(logits(model, IDS, routing_weights=torch.zeros(len(EXPERTS))), logits(bare, IDS))


def test_router_mixes_deltas_onto_the_quantised_layers_own_output(stored, bag):
    kind, place = stored
    router = DynamicHybridRouter(HIDDEN, len(EXPERTS), 2).eval()
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(1))
    peft_model = stock(bag / "expert_0", quantised(place))
    for e in range(1, len(EXPERTS)):
        peft_model.load_adapter(bag / f"expert_{e}", adapter_name=f"expert_{e}")
    model = attach_router(peft_model, router)
    with watched(model) as seen:
        logits(model, IDS)
    weights = model.last_routing_weights.double()
    assert len(seen) == 2 * len(TARGETS) and (weights > 0).sum(-1).eq(2).all()
    for layer, (x, got) in seen.items():
        want, bound = mixed(layer, x, weights)
        with torch.no_grad():
            delta = want - layer.base_layer(x).double()
        assert delta.abs().max() > 1000 * bound.max(), kind  # else it could not fail
        assert ((got.double() - want).abs() <= bound).all(), kind


def test_gradients_reach_experts_and_not_the_base(stored, bag):
    model = load_checkpoint(bag, base_model=quantised(stored[1]))
    model.expert_manager.activate_all_experts()
    weights = torch.full((1, 1, len(EXPERTS)), 1 / len(EXPERTS))
    model(IDS, labels=IDS, routing_weights=weights).loss.backward()
    own = {name: parameter for name, parameter in model.peft_model.named_parameters() if "lora_" in name}
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in own.values())
    assert all(parameter.grad is None for name, parameter in model.peft_model.named_parameters() if name not in own)


@contextmanager
def watched(model: DyLoRA_MoE) -> Iterator[dict[RoutedLinear, tuple[Tensor, Tensor]]]:
    """Each routed layer's last input and output."""
    seen: dict[RoutedLinear, tuple[Tensor, Tensor]] = {}
    layers = model.routed_layers().values()
    hooks = [layer.register_forward_hook(lambda layer, args, out: seen.update({layer: (args[0], out)})) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def mixed(layer: RoutedLinear, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own base output and the weighted deltas in float64, and how far float32 may be from it.

    A float32 sum of n products is off by at most n u times the sum of their magnitudes, u = 2**-24 (Higham 2002, 3.1); here they
    are chained: over the inputs, over the ranks of all experts, and a scale, a weight and a sum.
    """
    want = layer.base_layer(x).double()
    size = want.abs()
    for e, name in enumerate(layer.lora_A):
        down, up = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        share = weights[..., e : e + 1] * layer.scaling[name]
        want = want + share * (x.double() @ down.T @ up.T)
        size = size + share.abs() * (x.double().abs() @ down.abs().T @ up.abs().T)
    ranks = sum(module.weight.shape[0] for module in layer.lora_A.values())
    return want, (x.shape[-1] + ranks + 3) * 2**-24 * size
