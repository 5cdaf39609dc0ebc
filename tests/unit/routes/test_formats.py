"""Checkpoints of every kind of router: the analysis of a batch is that of each text alone, read from the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dylo_moe import attach_router
from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.formats import GatesState, GateState
from dylo_moe.gates import LayerGate
from dylo_moe.routes.analysing import analyse
from dylo_moe.routes.observing import Tokens, layer_names, observe
from dylo_moe.routes.texts import Text
from dylo_moe.routes.tokens import prompt_ids
from fixtures.adamole import write_adamole
from fixtures.gated import draw
from fixtures.moe_peft import Recipe, write_moe_peft
from fixtures.mola import write_mola
from fixtures.routed import write_routed
from harness.specimens import XLoraChoices, write_arrow_checkpoint, write_base, write_checkpoint, write_xlora_checkpoint

TEXTS = [Text("a", "def swap(a, b):\n    return b, a\n"), Text("b", "x"), Text("a", "for i in range(3):\n")]
LAYERWISE = XLoraChoices(layerwise_scalings=True, xlora_depth=2, top_k_lora=2)
# kind -> how to write it, and how many layers route for themselves
WRITERS = {
    "dylo-moe": (lambda path, base: write_checkpoint(path, base, num_experts=3, targets="lm_head"), 1),
    "peft-xlora": (lambda path, base: write_xlora_checkpoint(path, base, num_experts=3, choices=LAYERWISE), 8),
    "peft-arrow": (write_arrow_checkpoint, 8),
    "mixlora": (lambda path, base: write_moe_peft(path, base, Recipe("mixlora", safetensors=True)), 2),
    "adamole": (lambda path, base: write_adamole(path, draw(base, ("q_proj",)), pickled=False, max_threshold=None), 2),
    "mola": (lambda path, base: write_mola(path, draw(base, ("q_proj",), experts=(2, 3), ranks=(4, 4)), pickled=False), 2),
    "a gate per Linear": (lambda path, base: write_routed(path, base, "softmax"), 8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@torch.no_grad()
def weights_alone(decoder, text):
    """(S, L, E), of this text alone, without padding."""
    decoder.model(torch.tensor([prompt_ids(decoder, text.prompt)]))
    weights = decoder.model.last_routing_weights[0].double().numpy()
    return weights if weights.ndim == 3 else weights[:, None]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_router_is_read_per_layer_and_without_padding(kind, base, tmp_path):
    write, layers = WRITERS[kind]
    write(tmp_path / "checkpoint", base)
    assume = {"top_k": 2} if kind == "mola" else {}
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", dtype="float32", temperature=0.0, assume=assume)
    document = analyse(decoder, TEXTS, batch_size=3).document
    alone = [weights_alone(decoder, text) for text in TEXTS]
    assert len(document["layers"]) == layers == alone[0].shape[1]
    sizes = [np.abs(weights) for weights in alone]
    shares = [size / size.sum(-1, keepdims=True) for size in sizes]
    for number, layer in enumerate(document["layers"]):
        expected = np.concatenate(shares)[:, number].mean(axis=0)
        np.testing.assert_allclose(layer["share"], expected, atol=2e-5)
    np.testing.assert_allclose(document["balance"]["mean_weight"], np.concatenate(alone).mean(axis=(0, 1)), atol=2e-5)
    np.testing.assert_allclose(document["tasks"][1]["share"], shares[1].mean(axis=(0, 1)), atol=2e-5)
    assert document["tokens"] == sum(map(len, alone))
    assert [layer["experts"] for layer in document["layers"]] == ([2, 3] if kind == "mola" else [alone[0].shape[2]] * layers)


def test_shares_before_the_top_k_are_those_of_training_and_leave_no_hook(base, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=3, top_k=1, temperature=2.0)
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", dtype="float32", temperature=0.0)
    document = analyse(decoder, TEXTS).document
    assert document["decision"]["confidence"]["mean"] == 1.0 and document["router"]["top_k"] == 1
    decoder.model.router.train()
    confidence = np.concatenate([weights_alone(decoder, text).max(-1)[:, 0] for text in TEXTS])
    assert document["decision_before_top_k"]["confidence"]["mean"] == pytest.approx(confidence.mean(), abs=1e-5)
    assert not decoder.model.router.gate._forward_hooks


def test_router_that_chooses_nothing_has_no_shares_before_the_choice(base, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=3, top_k=3)
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", dtype="float32", temperature=0.0)
    assert analyse(decoder, TEXTS).document["decision_before_top_k"] is None


def test_gate_on_the_head_sees_every_token(base):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter, adapter_name="a")
    peft_model.add_adapter("b", adapter)
    units = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head")
    gates = GatesState({unit: GateState(torch.randn(2, 48)) for unit in units}, "softmax", 2)
    router = torch.nn.ModuleList(LayerGate(gates.gates[unit], gates) for unit in units)
    model = attach_router(peft_model, router).eval()
    texts = [Tokens(0, [5, 9, 33, 7], 4), Tokens(0, [8, 2], 1)]
    for number, seen in observe(model, texts, 2):
        with torch.no_grad():
            model(torch.tensor([texts[number].ids]))
        np.testing.assert_allclose(seen.weights, model.last_routing_weights[0].double().numpy(), atol=1e-5)
    assert layer_names(model) == list(units)


def test_router_that_is_undecided_before_the_choice_is_found_although_its_weights_are_0_and_1(base, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=3)
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", dtype="float32", temperature=0.0)
    torch.nn.init.zeros_(decoder.model.router.gate.weight)
    torch.nn.init.zeros_(decoder.model.router.gate.bias)
    document = analyse(decoder, TEXTS).document
    assert document["decision"]["entropy"]["mean"] == 0.0 and document["decision_before_top_k"]["entropy"]["mean"] == 1.0
    assert {"undecided", "collapsed"} <= {finding["about"] for finding in document["findings"]}


def test_batch_that_does_not_fit_is_halved(base, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=3)
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", dtype="float32", temperature=0.0)
    whole = analyse(decoder, TEXTS, batch_size=3).document
    sizes = []

    def too_large(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    decoder.model.causal_lm.register_forward_pre_hook(too_large, with_kwargs=True)
    halved = analyse(decoder, TEXTS, batch_size=3).document
    assert sizes == [3, 1, 2, 1, 1]
    np.testing.assert_allclose(halved["balance"]["share"], whole["balance"]["share"], atol=1e-6)


def test_entropy_before_the_choice_is_compared_with_that_of_the_layer_s_own_experts(base, tmp_path):
    mixture = draw(base, ("q_proj",), experts=(2, 3), ranks=(4, 4))
    write_mola(tmp_path / "checkpoint", mixture, pickled=False)
    options = {"dtype": "float32", "temperature": 0.0, "assume": {"top_k": 1}}
    decoder = PeftMoEDecoder(str(tmp_path / "checkpoint"), "humaneval", **options)
    document = analyse(decoder, TEXTS).document
    logits = [[], []]
    for gate, kept in zip(decoder.model.router, logits, strict=True):
        gate.gate.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output[0].double()))
    for text in TEXTS:
        weights_alone(decoder, text)
    shares = [torch.cat(kept).softmax(-1) for kept in logits]
    entropy = [-(p * p.log()).sum(-1) / np.log(p.shape[-1]) for p in shares]
    assert [p.shape[-1] for p in shares] == [2, 3]
    expected = torch.stack(entropy).mean().item()
    assert document["decision_before_top_k"]["entropy"]["mean"] == pytest.approx(expected, abs=1e-5)
