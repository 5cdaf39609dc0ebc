"""X-LoRA of its authors' own package: read, and equal to its equation in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dylo_moe import detect_model_format, errors, load_checkpoint
from dylo_moe.formats import read_checkpoint
from dylo_moe.formats.peft_xlora_write import write_xlora
from fixtures.xlora import equation, write_standalone
from harness.specimens import write_base
from harness.specimens.xlora import XLoraChoices

CONFIG, CLASSIFIER = "xlora_config.json", "xlora_classifier.safetensors"
IDS = torch.arange(7, 31).reshape(2, 12)
NAMES = ("zeta", "3", "alpha")  # neither sorted nor all of them names that PEFT could use
# The logits are of size 1 to 10 and pass some 30 chained float32 products of length 80: 30 * 80 * 2**-24 = 1.4e-4 at worst.
TOLERANCE = 1.4e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def written(base, tmp_path) -> Path:
    return write_standalone(tmp_path / "xlora", base, NAMES, XLoraChoices(xlora_depth=2))


def edit(path: Path, **changes: object) -> None:
    content = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("choices", "layout"),
    [
        (XLoraChoices(), {}),
        (XLoraChoices(xlora_depth=3, top_k_lora=2, global_scaling_weight=0.6), {"below": "X-LoRA_adapters"}),
        (XLoraChoices(xlora_depth=4, layerwise_scalings=True, softmax_temperature=2.0), {"bias": False}),
        (XLoraChoices(xlora_depth=3, enable_softmax=False, global_scaling_weight=0.1), {"relu": False, "bias": False}),
    ],
)
def test_logits_equal_the_equation(base, tmp_path, choices, layout):
    path = write_standalone(tmp_path / "xlora", base, NAMES, choices, **layout)
    assert detect_model_format(path) == "xlora"
    model = load_checkpoint(path)
    assert model.expert_names == ["zeta", "expert_3", "alpha"]
    want = equation(path, base, [path / layout.get("below", ".") / name for name in NAMES], IDS)
    with torch.no_grad():
        got = model(IDS)
        without = model(IDS, routing_weights=torch.zeros(3)).logits
    assert (want - without).abs().max() > 0.1
    assert (got.logits - want).abs().max() < TOLERANCE


def test_cached_generation_equals_recomputation(base, tmp_path):
    choices = XLoraChoices(xlora_depth=2, layerwise_scalings=True, top_k_lora=2)
    model = load_checkpoint(write_standalone(tmp_path / "xlora", base, NAMES, choices))
    rows = [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*rows)


def test_a_pickled_classifier_is_the_same(written):
    safe = read_checkpoint(written).router
    torch.save(load_file(written / CLASSIFIER), written / "xlora_classifier.pt")
    (written / CLASSIFIER).unlink()
    read = read_checkpoint(written)
    assert all(
        torch.equal(a, b) for one, two in zip(read.router.layers, safe.layers, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert any("pickle" in line for line in read.warnings)


def test_saved_natively_it_computes_the_same(written, tmp_path):
    model = load_checkpoint(written)
    model.save_pretrained(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "native")(IDS).logits, model(IDS).logits)


def test_without_biases_there_is_no_way_to_peft(base, tmp_path):
    path = write_standalone(tmp_path / "xlora", base, NAMES, XLoraChoices(), bias=False)
    with pytest.raises(errors.InvalidField, match="bias.*PEFT does not have"):
        write_xlora(tmp_path / "peft", read_checkpoint(path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"enable_softmax_topk": True}, errors.InvalidField, "depends on later ones and other rows"),
        ({"adapters": ["zeta", "zeta", "alpha"]}, errors.InvalidField, "different expert names"),
        ({"adapters": []}, errors.InvalidField, "adapters"),
        ({"adapters": ["zeta", "3"]}, errors.ExpertCountMismatch, "last.weight"),
        ({"adapters": ["zeta", "3", "../alpha"]}, errors.ExpertMissing, "alpha"),
        ({"adapters": ["zeta", "3", "beta"]}, errors.ExpertMissing, "beta"),
        ({"use_bias": False}, errors.ForeignTensor, "bias"),
        ({"enable_relu_and_dropout": False, "xlora_depth": 3}, errors.GateMissing, "inner.1.weight"),
        ({"scaling_pass_value": 1}, errors.InvalidField, "scaling_pass_value"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_refused(written, changes, error, message):
    edit(written, **changes)
    with pytest.raises(error, match=message):
        read_checkpoint(written)


def test_without_a_classifier_it_is_refused(written):
    (written / CLASSIFIER).unlink()
    with pytest.raises(errors.MissingFile, match="xlora_classifier"):
        read_checkpoint(written)
