"""Checkpoints of every kind of router: the analysis of a batch is that of each text alone, read from the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.routes.analysing import analyse
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
