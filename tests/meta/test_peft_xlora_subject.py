"""Stock PEFT's X-LoRA behind the protocol: it computes what it is told, and what it is not told stays PEFT's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dylo_moe import load_checkpoint
from harness.specimens import write_base, write_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint
from harness.subjects import find_subject

IDS = torch.arange(7, 31).reshape(2, 12)
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
SEEN = MASK.bool()
WEIGHTS = torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(0))
# A softmax over the top-k, which the classifier's weights get and given weights must not get.
CHOICES = XLoraChoices(top_k_lora=2, enable_softmax=False, enable_softmax_topk=True, global_scaling_weight=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "qwen")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base) -> Path:
    written = write_xlora_checkpoint(tmp_path_factory.mktemp("xlora") / "there", base, num_experts=3, choices=CHOICES)
    return written.rename(written.parent / "moved")  # so that the recorded paths lead nowhere


@pytest.fixture(scope="module")
def pair(checkpoint):
    return find_subject("peft-xlora").load(checkpoint), load_checkpoint(checkpoint)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32 logits of size 1 to 10


@torch.no_grad()
@pytest.mark.parametrize(
    "routing", [{}, {"routing_weights": WEIGHTS}, {"expert_id": 1}, {"expert_id": torch.tensor([2, 0])}, {}], ids=str
)
def test_it_computes_what_ours_computes(pair, routing):
    peft, ours = pair
    assert_close(peft(IDS, MASK, **routing).logits[SEEN], ours(IDS, MASK, **routing).logits[SEEN])


@torch.no_grad()
def test_it_tells_the_weights_that_its_layers_mixed(pair):
    peft, ours = pair
    peft(IDS, MASK), ours(IDS, MASK)
    told = peft.last_routing_weights
    assert told.shape == (2, 12, 12, 3)
    assert_close(told[SEEN], ours.last_routing_weights.unsqueeze(2).expand_as(told)[SEEN])


@torch.no_grad()
def test_its_layers_mix_alone(pair):
    peft, ours = pair
    x = torch.randn(2, 5, 56)
    assert list(peft.routed_layers()) == list(ours.routed_layers())
    name = next(iter(peft.routed_layers()))
    assert_close(peft.routed_layers()[name].mix(x, WEIGHTS[:, :5]), ours.routed_layers()[name].mix(x, WEIGHTS[:, :5]))


@pytest.mark.parametrize("strategy", ["router", "single:2"])
def test_it_writes_the_same_text(pair, strategy):
    texts = [model.generate(IDS, MASK, strategy=strategy, max_new_tokens=4, do_sample=False) for model in pair]
    assert torch.equal(*texts)


def test_what_it_cannot_do_is_refused(pair, base, tmp_path):
    peft = pair[0]
    with pytest.raises(ValueError, match="single:<i>, i from 0 to 2"):
        peft.generate(IDS, MASK, strategy="single:3")
    with pytest.raises(IndexError):
        peft(IDS, expert_id=3)
    native = write_checkpoint(tmp_path / "native", base)
    with pytest.raises(ValueError, match="does not read"):
        find_subject("peft-xlora").load(native / "experts" / "expert_0")


@torch.no_grad()
def test_detached_it_is_the_base(checkpoint, base):
    subject = find_subject("peft-xlora")
    model = subject.load(checkpoint)
    model(IDS)
    assert torch.equal(subject.detach(model)(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
