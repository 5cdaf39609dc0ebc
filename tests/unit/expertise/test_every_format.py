"""Experts of every format are compared: where a likeness is not defined that is said, and nothing breaks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from dylo_moe import load_checkpoint
from dylo_moe.errors import OptionError
from dylo_moe.expertise.analysis import strategies_of
from dylo_moe.expertise.document import describe_weights
from dylo_moe.expertise.observing import observe
from dylo_moe.expertise.report import weight_rows
from dylo_moe.expertise.weights import compare_weights, without_effect
from dylo_moe.formats import read_checkpoint
from dylo_moe.routes.observing import Tokens
from dylo_moe.strategies import best_experts
from tests.unit.formats.every_format import OPTIONS, write_every_format

TOKENS = Tokens(0, [5, 9, 33, 2, 60, 8], 4)
WHOLE_MLPS = ("mixlora",)
FORMATS = (
    *(
        "adamole",
        "dylo-moe",
        "dylora-bundle",
        "dylora-full-state",
        "dylora-separated",
        "hydralora",
        "lora-bag",
        "loramoe",
        "merged",
    ),
    *("mergoo", "mixlora", "moe-peft-loramoe", "moe-peft-mola", "mola", "peft-adalora", "peft-arrow", "peft-lora", "peft-poly"),
    *("peft-xlora", "xlora"),
)


@torch.no_grad()
def router_shares(model):
    """By their definition: over the four tokens of the prompt, and over the two of the answer."""
    if model.router is None:
        return None, None
    model(torch.tensor([TOKENS.ids]))
    weights = model.last_routing_weights[0].double().abs()
    shares = weights / weights.sum(-1, keepdim=True)
    shares = shares.mean(1) if shares.dim() == 3 else shares
    return shares[:4].mean(0).tolist(), shares[4:].mean(0).tolist()


@torch.no_grad()
def prompt_divergences(model):
    """By SciPy, of all experts in one batch."""
    rows = torch.tensor([TOKENS.ids[:4]]).expand(model.num_experts, -1)
    p = softmax(model(rows, expert_id=torch.arange(model.num_experts)).logits.double().numpy(), axis=-1)
    return [[rel_entr(one, other).sum(-1).mean() for other in p] for one in p]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    torch.set_num_threads(1)
    return write_every_format(tmp_path_factory.mktemp("formats"))


def test_no_format_is_forgotten(every):
    assert sorted(every) == sorted(FORMATS)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "merged"])
def test_experts_of_a_format_are_compared(every, name):
    checkpoint = read_checkpoint(every[name], **OPTIONS.get(name, {}))
    experts = checkpoint.num_experts
    weights = compare_weights(checkpoint)
    assert set(weights.reasons) == ({expert.name for expert in checkpoint.experts} if name in WHOLE_MLPS else set())
    defined = np.diag(weights.cosine)
    assert np.array_equal(~np.isnan(defined), weights.norms > 0)
    np.testing.assert_allclose(defined[~np.isnan(defined)], 1, atol=1e-9)
    found = describe_weights(weights, without_effect(checkpoint))
    json.dumps(found, allow_nan=False)
    assert len(weight_rows(found, weights.experts)[1]) == experts * (experts - 1) // 2

    base = str(every["dylo-moe"].parent / "base")  # one format does not record it
    model = load_checkpoint(every[name], base, **OPTIONS.get(name, {}))
    assert ("router" in strategies_of(checkpoint)) == (model.router is not None)
    seen = observe(model, TOKENS)
    for shares, wanted in zip((seen.prompt, seen.answer), router_shares(model), strict=True):
        assert (shares is None) == (wanted is None)
        assert shares is None or shares == pytest.approx(wanted, abs=1e-6)
    assert seen.best == int(best_experts(model, torch.tensor([TOKENS.ids[:4]])))
    assert seen.divergence.shape == seen.same_choice.shape == (experts, experts) and seen.positions == 4
    np.testing.assert_allclose(seen.divergence, prompt_divergences(model), atol=1e-5)
    assert np.diag(seen.same_choice).tolist() == [1.0] * experts


def test_merged_model_has_no_experts_to_compare(every):
    with pytest.raises(OptionError, match="a merged model has no experts to compare"):
        strategies_of(read_checkpoint(every["merged"]))
