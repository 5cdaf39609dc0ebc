"""X-LoRA of its authors' own package: read, and equal to its equation in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from dylo_moe import PeftMoEDecoder, detect_model_format, errors, load_checkpoint
from dylo_moe.completions import Wanted
from dylo_moe.formats import read_checkpoint
from dylo_moe.formats.peft_xlora_write import write_xlora
from dylo_moe.routes.observing import Tokens, observe
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
        (XLoraChoices(top_k_lora=2, enable_softmax_topk=True, global_scaling_weight=9.0), {}),
        (XLoraChoices(layerwise_scalings=True, enable_softmax_topk=True, global_scaling_weight=9.0), {}),
        (XLoraChoices(xlora_depth=2, enable_softmax=False, enable_softmax_topk=True, global_scaling_weight=9.0), {}),
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


WHOLE = XLoraChoices(xlora_depth=2, top_k_lora=2, enable_softmax_topk=True, global_scaling_weight=9.0)


def test_a_softmax_over_the_batch_is_said_and_saved_and_has_no_cache(base, tmp_path):
    model = load_checkpoint(write_standalone(tmp_path / "xlora", base, NAMES, WHOLE))
    assert any("one softmax over all tokens of a batch" in line for line in model.checkpoint.warnings)
    model.save_pretrained(tmp_path / "native")
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(load_checkpoint(tmp_path / "native")(IDS).logits, logits)
        assert (model(IDS[:1]).logits - logits[:1]).abs().max() > 0.1
        with pytest.raises(errors.RoutingError, match="use_cache=False"):
            model(IDS, past_key_values=DynamicCache())
        ids = IDS
        for _ in range(4):  # the whole sequence for every token, as the package does it
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True), ids)
    with pytest.raises(errors.InvalidField, match="softmax_topk.*PEFT does not have"):
        write_xlora(tmp_path / "peft", model.checkpoint)


def test_the_user_may_have_the_softmax_for_each_token(base, tmp_path):
    path = write_standalone(tmp_path / "xlora", base, NAMES, WHOLE)
    model = load_checkpoint(path, softmax_topk="token")
    assert not model.checkpoint.warnings
    write_xlora(tmp_path / "peft", model.checkpoint)
    early = load_checkpoint(tmp_path / "peft", softmax_topk="batch")
    with torch.no_grad():
        assert (load_checkpoint(tmp_path / "peft")(IDS).logits - model(IDS).logits).abs().max() < TOLERANCE
        assert (early(IDS).logits - load_checkpoint(path)(IDS).logits).abs().max() < TOLERANCE
    with pytest.raises(errors.InvalidField, match="softmax_topk: found 'row', expected one of token, batch"):
        read_checkpoint(path, softmax_topk="row")


def test_what_the_decoder_writes_does_not_depend_on_the_rows_beside_it(base, tmp_path):
    model = load_checkpoint(write_standalone(tmp_path / "xlora", base, NAMES, WHOLE))
    options = {"batch_size": 4, "temperature": 0.0, "max_new_tokens": 4, "dtype": "float32", "model": model}
    decoder = PeftMoEDecoder("x", "humaneval", base_model=str(base), **options)
    prompts = ["def add(a, b):", "import os", "x = 1"]
    wanted = [Wanted(prompt, "router", 0) for prompt in prompts]
    texts = {done.wanted.prompt: done.text for done in decoder.complete_many(wanted, do_sample=False)}
    for prompt in prompts:
        ids = decoder.encode(prompt)
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert texts[prompt] == decoder.tokenizer.decode(new, skip_special_tokens=True).replace("\t", "    ")


def test_the_analysis_of_routing_looks_at_each_text_alone(base, tmp_path):
    model = load_checkpoint(write_standalone(tmp_path / "xlora", base, NAMES, WHOLE))
    texts = [Tokens(0, list(range(9, 9 + length)), 1) for length in (4, 9, 6)]
    for number, seen in observe(model, texts, batch_size=3):
        with torch.no_grad():
            model(torch.tensor([texts[number].ids]))
        assert np.array_equal(seen.weights[:, 0], model.last_routing_weights[0].double().numpy())


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
